"""A GNT small enough to run in milliseconds, with random numbers everywhere, and batches for it."""

from __future__ import annotations

import torch
from ball_scenes import make_scene
from torch.utils.data import default_collate

from vitrify.convert.copies import randomise
from vitrify.nvs import GNT, RayBatch, create
from vitrify.nvs.task import RayDataset

TINY = {"width": 16, "depth": 2, "points": 8, "frequencies": 2, "features": 4, "channels": (8, 8, 8), "squeeze": 4}
SIZE = {"height": 24, "width": 32}


def tiny(**changes) -> GNT:
    model = create("gnt_small", **{**TINY, **changes})
    randomise(model, torch.Generator().manual_seed(0))
    return model.eval()


def batch(rays: int = 20, sources: int = 4, scenes: int = 2) -> tuple[RayBatch, torch.Tensor]:
    data = RayDataset([make_scene(k, views=6, **SIZE) for k in range(scenes)], rays, sources, train=False)
    return default_collate([data[2 + 6 * k] for k in range(scenes)])
