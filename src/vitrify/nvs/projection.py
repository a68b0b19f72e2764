"""Points in space as the source views see them: where they fall, what is there, and from which direction.

GNT (ICLR 2023), section 3.2, after IBRNet (CVPR 2021). Cameras and pixels as in `nvs.rays`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.nvs.rays import RayBatch

_FAR_OUTSIDE = 1e6  # pixels: what points behind a camera are clamped to, which no image reaches


class Samples(NamedTuple):
    """P points on each of B * R rays, and what V source views see of them.

    points      (B * R, P, 3) in world coordinates
    towards     (B * R, 3): the rays' directions, of length 1
    features    (B * R, P, V, 3 + C): RGB and features; 0 outside of a view
    angles      (B * R, P, V, 4): the unit vector between the directions to the target and the source camera, and their
                cosine
    valid       (B * R, P, V) bool: the point is in front of the camera and inside the image
    """

    points: Tensor
    towards: Tensor
    features: Tensor
    angles: Tensor
    valid: Tensor


def project(points: Tensor, intrinsics: Tensor, camera_to_world: Tensor) -> tuple[Tensor, Tensor]:
    """Return pixels (B, V, N, 2) of points (B, N, 3) in each view, and whether they are in front of it (B, V, N).

    intrinsics (B, V, 3, 3), camera_to_world (B, V, 4, 4), rigid. Always finite; behind a camera without meaning.
    """
    rotation, centre = camera_to_world[..., :3, :3], camera_to_world[..., :3, 3]
    in_camera = (points[:, None] - centre[:, :, None]) @ rotation
    projected = in_camera @ intrinsics.mT
    depth = projected[..., 2:]
    pixels = (projected[..., :2] / depth.clamp(min=1e-8)).clamp(-_FAR_OUTSIDE, _FAR_OUTSIDE)
    return pixels, depth[..., 0] > 0


def sample(batch: RayBatch, features: Tensor, depths: Tensor) -> Samples:
    """Return what the source views see of the points at `depths` (B, R, P) on the batch's rays.

    features (B, V, C, h, w): maps of the source images in any resolution; their corner pixels lie on the images'.
    """
    (size, rays, count), views = depths.shape, batch.images.shape[1]
    points = batch.origins[:, :, None] + depths[..., None] * batch.directions[:, :, None]
    flat = points.flatten(1, 2)
    pixels, in_front = project(flat, batch.intrinsics, batch.camera_to_world)
    height, width = batch.images.shape[-2:]
    extent = pixels.new_tensor([width - 1, height - 1])
    # From corner pixel to corner pixel, as the released weights expect it (`align_corners`).
    places = 2 * (pixels - 0.5) / extent - 1
    valid = in_front & (places.abs() <= 1).all(-1)
    grid = places.reshape(size * views, rays, count, 2)
    seen = [
        F.grid_sample(maps.flatten(0, 1), grid, align_corners=True).reshape(size, views, -1, rays, count)
        for maps in (batch.images, features)
    ]
    return Samples(
        points=points.flatten(0, 1),
        towards=F.normalize(batch.directions, dim=-1).flatten(0, 1),
        features=torch.cat(seen, 2).permute(0, 3, 4, 1, 2).flatten(0, 1),
        angles=_angles(flat, batch, rays),
        valid=valid.reshape(size, views, rays, count).permute(0, 2, 3, 1).flatten(0, 1),
    )


def _angles(points: Tensor, batch: RayBatch, rays: int) -> Tensor:
    """Return (B * R, P, V, 4); points (B, R * P, 3)."""
    targets = batch.origins.repeat_interleave(points.shape[1] // rays, 1)
    to_target = F.normalize(targets - points, dim=-1)[:, :, None]
    to_source = F.normalize(batch.camera_to_world[:, None, :, :3, 3] - points[:, :, None], dim=-1)
    between = F.normalize(to_target - to_source, dim=-1, eps=1e-6)
    cosine = (to_target * to_source).sum(-1, keepdim=True)
    return torch.cat([between, cosine], -1).reshape(len(points) * rays, -1, *between.shape[2:3], 4)
