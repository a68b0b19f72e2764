"""Scenes that are computed: a checkered wall behind a checkered ball, seen by cameras on an arc."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrify.nvs.rays import pixel_rays
from vitrify.nvs.scene import Scene, View

WALL, CENTRE, RADIUS = 4.0, (0.0, 0.0, 2.5), 0.6


def look_at(position: Tensor, target: Tensor) -> Tensor:
    """Return the camera_to_world of a camera there that looks at the target; y down."""
    forward = torch.nn.functional.normalize(target - position, dim=0)
    right = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), forward), dim=0)
    pose = torch.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = right, torch.linalg.cross(forward, right), forward, position
    return pose


def colours_and_depths(origins: Tensor, directions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return what rays (R, 3) meet: colours (R, 3) and depths (R,)."""
    generator = torch.Generator().manual_seed(seed)
    palette, scale = torch.rand(2, 2, 3, generator=generator), 1.5 + torch.rand(2, generator=generator)
    depth = (WALL - origins[:, 2]) / directions[:, 2]
    offset = origins - torch.tensor(CENTRE)
    a, b = directions.square().sum(1), (directions * offset).sum(1)
    root = b.square() - a * (offset.square().sum(1) - RADIUS**2)
    ball = root > 0
    depth = torch.where(ball, (-b - root.clamp(min=0).sqrt()) / a, depth)
    points = origins + depth[:, None] * directions
    which = ball.long()
    pattern = torch.sin(points * math.pi * scale[which][:, None]).prod(1, keepdim=True).sign() / 2 + 0.5
    flat = torch.sin(points[:, :2] * math.pi * scale[0]).prod(1, keepdim=True) / 2 + 0.5
    share = torch.where(ball[:, None], pattern, flat)
    return palette[which, 0] * share + palette[which, 1] * (1 - share), depth


def make_scene(seed: int = 0, views: int = 9, height: int = 36, width: int = 48) -> Scene:
    """Views on an arc, a little up and down; depths from 1 to 6."""
    intrinsics = torch.tensor([[1.1 * width, 0, width / 2], [0, 1.1 * width, height / 2], [0, 0, 1.0]])
    made = []
    for i in range(views):
        turn = (i / max(1, views - 1) - 0.5) * 1.2
        position = torch.tensor([2.2 * math.sin(turn), 0.3 * math.sin(2.4 * i), 2.5 - 2.5 * math.cos(turn)])
        pose = look_at(position, torch.tensor([0.0, 0.0, 2.8]))
        colours, _ = colours_and_depths(*pixel_rays(intrinsics, pose, height, width), seed)
        made.append(View(f"{i}", colours.mT.reshape(3, height, width).contiguous(), intrinsics, pose))
    return Scene(f"ball{seed}", tuple(made), 1.0, 6.0, torch.zeros(3))
