"""Two trivial renderers, which a learnt one must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.errors import InputError
from vitrify.nvs.projection import project
from vitrify.nvs.rays import pixel_rays
from vitrify.nvs.scene import Scene, View

_PLANES = 64
_LEAST_SEEN = 0.5


def nearest_source(scene: Scene, target: View, sources: Sequence[int]) -> Tensor:
    """Return the picture of the first of `sources` (the nearest, as `nearest_views` orders them): (3, H, W) in [0, 1].

    Scaled to the target's size where it has another. Raises InputError without sources.
    """
    _check(sources)
    image = scene.views[sources[0]].rgb()[None]
    size = (target.height, target.width)
    return image[0] if image.shape[2:] == size else F.interpolate(image, size, mode="bilinear", antialias=True)[0]


def mean_on_a_plane(scene: Scene, target: View, sources: Sequence[int]) -> Tensor:
    """Return the mean of the source views, projected onto one plane and from there into the target: (3, H, W).

    The plane faces the target. Of 64 depths, even in inverse depth from near to far, it is the one at which the
    sources agree best: least variance of their colours, mean over the pixels that two or more see, which must be half
    of all. That needs no truth, and is better than a fixed depth; where there are no such pixels, it is the middle one.
    Pixels that no source sees get the scene's background. Raises InputError without sources.
    """
    _check(sources)
    views = [scene.views[index] for index in sources]
    inverse = torch.linspace(1 / scene.near, 1 / scene.far, _PLANES)
    planes = [_on_plane(target, views, depth, scene.background) for depth in (1 / inverse).tolist()]
    # Where they cannot disagree (one source, or no overlap), the middle.
    best = min(range(_PLANES), key=lambda index: (planes[index][1], abs(index - _PLANES // 2)))
    return planes[best][0]


def _check(sources: Sequence[int]) -> None:
    if not sources:
        raise InputError("there is no source view to render from")


def _on_plane(target: View, views: Sequence[View], depth: float, background: Tensor) -> tuple[Tensor, float]:
    """Return the mean (3, H, W) of what the views see at this depth before the target, and how far they disagree."""
    origins, directions = pixel_rays(target.intrinsics, target.camera_to_world, target.height, target.width)
    intrinsics = torch.stack([view.intrinsics for view in views])[None]
    poses = torch.stack([view.camera_to_world for view in views])[None]
    pixels, in_front = project((origins + depth * directions)[None], intrinsics, poses)
    total, squares, count = torch.zeros(3, len(origins)), torch.zeros(3, len(origins)), torch.zeros(len(origins))
    for view, places, before in zip(views, pixels[0], in_front[0], strict=True):
        grid = 2 * places / torch.tensor([view.width, view.height]) - 1
        seen = (before & (grid.abs() <= 1).all(1)).float()
        # Within half a pixel of the border there is nothing to interpolate with.
        colours = F.grid_sample(view.rgb()[None], grid[None, None], padding_mode="border", align_corners=False)[0, :, 0]
        total, squares, count = total + seen * colours, squares + seen * colours**2, count + seen
    mean = total / count.clamp(min=1)
    shared = count > 1
    variance = (squares / count.clamp(min=1) - mean**2).mean(0)[shared]
    disagreement = variance.mean().item() if shared.float().mean() >= _LEAST_SEEN else float("inf")
    picture = torch.where(count > 0, mean, background[:, None])
    return picture.reshape(3, target.height, target.width), disagreement
