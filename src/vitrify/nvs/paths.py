"""Camera paths between photographs, for fly-throughs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrify.errors import InputError
from vitrify.nvs.scene import Scene

_KEYS = 8


def fly_through(scene: Scene, frames: int) -> Tensor:
    """Return (frames, 4, 4) float32 camera-to-world poses: a smooth closed path through up to 8 of the scene's cameras.

    They are those at the rim in 8 directions from the cameras' middle, which the path goes around once. Positions and
    rotations follow a Catmull-Rom spline, and each rotation is brought back to the nearest one that is rigid. A scene
    with fewer than 3 cameras gets a path to and fro. Raises InputError for less than 1 frame.
    """
    if frames < 1:
        raise InputError(f"a path needs 1 frame or more, not {frames}")
    poses = torch.stack([view.camera_to_world for view in scene.views]).double()
    keys = poses[_rim(poses[:, :3, 3])]
    places = torch.arange(frames, dtype=torch.float64) * len(keys) / frames
    return _spline(keys, places).float()


def _rim(centres: Tensor) -> list[int]:
    """Return indices of cameras around their middle, in the plane in which they spread most."""
    offsets = centres - centres.mean(0)
    plane = torch.linalg.svd(offsets, full_matrices=False).Vh[:2]
    x, y = (offsets @ plane.T).T if len(plane) == 2 else (offsets @ plane[0], torch.zeros(len(offsets)))
    sector = ((torch.atan2(y, x) / (2 * math.pi) + 0.5) * _KEYS).floor().long() % _KEYS
    keys = []
    for number in range(_KEYS):
        if (members := (sector == number).nonzero().flatten()).numel():
            keys.append(int(members[(x**2 + y**2)[members].argmax()]))
    return keys


def _spline(keys: Tensor, places: Tensor) -> Tensor:
    """Evaluate the closed Catmull-Rom spline of (n, 4, 4) poses at `places` in [0, n), through key i at place i."""
    index = places.floor().long()
    t = (places - index)[:, None, None]
    p0, p1, p2, p3 = (keys[(index + shift) % len(keys)] for shift in (-1, 0, 1, 2))
    poses = p1 + 0.5 * t * (p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0)))
    u, _, vh = torch.linalg.svd(poses[:, :3, :3])
    turned = torch.linalg.det(u @ vh).sign()  # -1 where keys look in opposite directions
    poses[:, :3, :3] = u @ torch.diag_embed(torch.stack([turned**2, turned**2, turned], -1)) @ vh
    return poses
