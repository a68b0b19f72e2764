"""Whole pictures: every pixel's ray of a camera, in chunks, from features that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrify.errors import InputError
from vitrify.nn.modes import evaluating
from vitrify.nvs.model import GNT
from vitrify.nvs.rays import RayBatch
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.task import ray_batch, source_images

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Rendering:
    """A picture that a model made; float32, on the CPU.

    rgb       (3, H, W) in [0, 1]
    depth     (H, W): along the camera's z axis, in the scene's unit; see `GNT.depth`. 0 where no source view sees
    coverage  (H, W): the share of each ray's points that a source view sees; 0 gives the background colour
    """

    rgb: Tensor
    depth: Tensor
    coverage: Tensor


@torch.no_grad()
def render(
    model: GNT,
    scene: Scene,
    target: View,
    sources: Sequence[int],
    *,
    chunk: int = 1024,
    features: Tensor | None = None,
    progress: Progress | None = None,
) -> Rendering:
    """Render the camera of `target` from the views of `scene` with the indices `sources`, in eval mode.

    target    its camera and size are used, its image is not read: see `novel_view`
    chunk     rays at a time; memory grows with it, the picture does not change
    features  what `source_features` returned for the same sources, to render several targets from them
    progress  called with (rays done, rays in all) after each chunk

    Raises InputError for no source, an index that the scene lacks, sources of several sizes, and a chunk below 1.
    """
    if chunk < 1:
        raise InputError(f"chunk must be at least 1 ray, not {chunk}")
    device = model.coarse.norm.weight.device
    batch = ray_batch(scene, target, sources)
    batch = RayBatch(*(tensor[None].to(device) for tensor in batch))
    total = batch.origins.shape[1]
    rgb, depth, coverage = [], [], []
    with evaluating(model):
        features = model.encode(batch.images) if features is None else features.to(device)
        for start in range(0, total, chunk):
            out = model.trace(batch.select(slice(start, start + chunk)), features)
            rgb.append(out.rgb[0].float().clamp(0, 1).cpu())
            depth.append((model.depth(out) * (out.coverage > 0))[0].float().cpu())
            coverage.append(out.coverage[0].float().cpu())
            if progress is not None:
                progress(min(start + chunk, total), total)
    size = target.height, target.width
    return Rendering(
        rgb=torch.cat(rgb).mT.reshape(3, *size),
        depth=torch.cat(depth).reshape(size),
        coverage=torch.cat(coverage).reshape(size),
    )


@torch.no_grad()
def source_features(model: GNT, scene: Scene, sources: Sequence[int]) -> Tensor:
    """Return the features of source views, (1, V, C, h, w) on the model's device, for `render`."""
    images = source_images(scene, sources)
    with evaluating(model):
        return model.encode(images[None].to(model.coarse.norm.weight.device))


def novel_view(like: View, camera_to_world: Tensor) -> View:
    """Return a view without a picture: the lens and size of `like` at another pose."""
    blank = torch.zeros(3, like.height, like.width)
    return View("novel", blank, like.intrinsics, camera_to_world)
