"""Recipes and designs of vitality's area (2.71 mm2), and the ranges of its recalled and assumed constants."""

from __future__ import annotations

from pathlib import Path

import vitrify
from vitrify import AttentionSpec, LinearSpec, Recipe


def taylor_shift() -> Recipe:
    """Taylor attention, and every projection and MLP layer in 4-bit shifts."""
    shift = LinearSpec("shift", bits=4)
    return Recipe("taylor + shifts", AttentionSpec("taylor"), projections=shift, mlp=shift)


RECIPES = {
    "vitality": vitrify.recipes.vitality,
    "shiftaddvit": vitrify.recipes.shiftaddvit,
    "vitrify": vitrify.recipes.vitrify,
    "taylor_shift": taylor_shift,
}

RANGES: dict[str, tuple[float, ...]] = {
    "clock_mhz": (250, 500, 1000),
    "engines.general.rows": (32, 64, 96),
    "engines.general.columns": (32, 64, 96),
    "sram_kib": (100, 200, 400),
    "dram.gb_per_s": (19.2, 38.4, 76.8, 153.6),
    "numbers.partial_bits": (16, 24, 32),
    "engines.special.lanes": (16, 64, 256),
    "engines.accumulators.lanes": (16, 64, 256),
    "engines.dividers.latency": (4, 16, 64),
}

SANGER_SHAPES = [
    {"array": (64, 64), "predictor": (64, 64)},
    {"array": (64, 64), "predictor": (64, 32)},
    {"array": (64, 64), "predictor": (32, 32)},
    {"array": (64, 56), "predictor": (64, 16)},
    {"array": (48, 64), "predictor": (64, 32)},
    {"array": (64, 48), "predictor": (32, 32)},
    {"array": (32, 64), "predictor": (32, 32)},
    {"array": (64, 32), "predictor": (32, 32)},
    {"array": (32, 32), "predictor": (32, 32)},
    {"array": (32, 32), "predictor": (16, 16)},
]
"""Shapes of Sanger that are tried at equal area; the fastest that fits is what vitality is compared with."""

HERE = Path(__file__).parent / "hardware"
BALANCED, SHIFTERS = str(HERE / "balanced.yaml"), str(HERE / "shifters.yaml")

DESIGNS: dict[str, tuple[str, str]] = {
    "vitality": ("vitality", "vitality"),
    "vitality-affine": ("affine", "vitality-affine"),
    "shiftadd, equal area, ShiftAddViT": ("shiftaddvit", "shiftadd"),
    "shiftadd, equal area, vitrify": ("vitrify", "shiftadd"),
    "shiftadd, equal area, Taylor and shifts": ("taylor_shift", "shiftadd"),
    "balanced, Taylor": ("affine", BALANCED),
    "balanced, Taylor and 4-bit codes": ("taylor_shift", BALANCED),
    "balanced, ShiftAddViT": ("shiftaddvit", BALANCED),
    "shifters, Taylor and 4-bit codes": ("taylor_shift", SHIFTERS),
    "balanced, softmax": ("softmax", BALANCED),
}
"""Of each the recipe and the hardware; shiftadd is scaled to the area of vitality, and the others have no more."""
