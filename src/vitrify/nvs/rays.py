"""Rays of a camera, the points sampled on them, and the batch in which a model gets both.

Cameras are OpenCV's: x right, y down, z forward; intrinsics in pixels, the centre of the first pixel at (0.5, 0.5).
A ray's direction has length 1 along the camera's z axis, so that distances on it are depths, in the scene's unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RayBatch(NamedTuple):
    """What a model renders: R rays for each of B target cameras, seen by V source views each; all float32.

    origins, directions  (B, R, 3) in world coordinates
    bounds               (B, 2): the nearest and farthest depth of the scene
    background           (B, 3): the colour of rays that no source view sees, in [0, 1]
    images               (B, V, 3, H, W): the source views, RGB in [0, 1]
    intrinsics           (B, V, 3, 3)
    camera_to_world      (B, V, 4, 4)
    """

    origins: Tensor
    directions: Tensor
    bounds: Tensor
    background: Tensor
    images: Tensor
    intrinsics: Tensor
    camera_to_world: Tensor

    def select(self, rays: slice) -> RayBatch:
        """Return the batch with some of its rays, of the same source views."""
        return self._replace(origins=self.origins[:, rays], directions=self.directions[:, rays])


def pixel_rays(
    intrinsics: Tensor, camera_to_world: Tensor, height: int, width: int, pixels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return origins and directions (R, 3) of the rays through the centres of an image's pixels, row by row.

    pixels: their numbers row * width + column, (R,) integers; all height * width by default.
    """
    if pixels is None:
        pixels = torch.arange(height * width, device=intrinsics.device)
    columns, rows = pixels % width + 0.5, pixels // width + 0.5
    points = torch.stack([columns, rows, torch.ones_like(rows)], -1).to(intrinsics.dtype)
    directions = points @ torch.linalg.inv(intrinsics).mT @ camera_to_world[:3, :3].mT
    return camera_to_world[:3, 3].expand_as(directions), directions


def spread(bounds: Tensor, rays: int, points: int, *, jitter: bool) -> Tensor:
    """Return depths (B, R, points), ascending, evenly spaced in 1/depth between the bounds (B, 2).

    jitter: draw each anew between the midpoints to its neighbours (stratified sampling), for training.
    """
    steps = torch.linspace(0, 1, points, device=bounds.device, dtype=bounds.dtype)
    near, far = bounds[:, :1], bounds[:, 1:]
    depths = (1 / (1 / near + steps * (1 / far - 1 / near)))[:, None].expand(-1, rays, -1)
    if not jitter:
        return depths
    middles = (depths[..., 1:] + depths[..., :-1]) / 2
    lower = torch.cat([depths[..., :1], middles], -1)
    upper = torch.cat([middles, depths[..., -1:]], -1)
    return lower + (upper - lower) * torch.rand_like(depths)


def refine(depths: Tensor, weights: Tensor, count: int, *, jitter: bool) -> Tensor:
    """Add `count` depths where the weights are: (B, R, P) -> (B, R, P + count), ascending.

    The inverse of the weights' cumulative distribution over 1/depth, between the midpoints of neighbouring depths
    (NeRF, section 5.2; in 1/depth as in IBRNet). jitter: at random instead of even quantiles.
    """
    inverse = 1 / depths
    edges = (inverse[..., 1:] + inverse[..., :-1]) / 2
    density = weights[..., 1:-1] + 1e-5  # a ray without weights is sampled evenly
    cumulative = (density / density.sum(-1, keepdim=True)).cumsum(-1)
    cumulative = torch.cat([torch.zeros_like(cumulative[..., :1]), cumulative], -1)
    if jitter:
        wanted = torch.rand(*depths.shape[:-1], count, device=depths.device, dtype=depths.dtype)
    else:
        quantiles = torch.linspace(0, 1, count, device=depths.device, dtype=depths.dtype)
        wanted = quantiles.expand(*depths.shape[:-1], count).contiguous()
    above = torch.searchsorted(cumulative, wanted, right=True).clamp(max=edges.shape[-1] - 1)
    below = (above - 1).clamp(min=0)
    low, high = cumulative.gather(-1, below), cumulative.gather(-1, above)
    width = high - low
    share = torch.where(width > 0, (wanted - low) / width.clamp(min=1e-12), 0.0)
    start, end = edges.gather(-1, below), edges.gather(-1, above)
    return torch.cat([depths, 1 / (start + share * (end - start))], -1).sort(-1).values
