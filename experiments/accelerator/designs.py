"""Recipes and designs of vitality's area (2.71 mm2), and the ranges of its recalled and assumed constants."""

from __future__ import annotations

from typing import Any

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

DESIGNS: dict[str, tuple[str, tuple[str, dict[str, Any]]]] = {}
