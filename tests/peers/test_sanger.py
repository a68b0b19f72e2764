"""Our account of Sanger's public simulator against the simulator itself, and our packing against its load balance.

Needs a checkout of github.com/hatsu3/Sanger, its folder in VITRIFY_SANGER, and pandas; skipped without.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrify.accelerator.masks import synthetic_masks
from vitrify.accelerator.packing import sub_rows
from vitrify.accelerator.published import sanger_layer, sanger_load_balance

ROOT = os.environ.get("VITRIFY_SANGER")
pytestmark = pytest.mark.skipif(ROOT is None, reason="VITRIFY_SANGER names no checkout of hatsu3/Sanger")


def theirs(name):
    """Import one of the checkout's modules by its path."""
    spec = importlib.util.spec_from_file_location(f"sanger_{name}", Path(str(ROOT)) / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tokens", [64, 197, 512, 1000])
@pytest.mark.parametrize(("density", "balance"), [(1, 1), (0.25, 0.8), (0.08, 0.37)])
def test_the_latency_of_a_layer(tokens, density, balance):
    pytest.importorskip("pandas", reason="pandas is not installed, which Sanger's script imports")
    seconds = theirs("bench_sanger").calc_sanger_latency(density, balance, tokens)
    assert sanger_layer(tokens, density, balance) == pytest.approx(1e3 * seconds, rel=1e-12)


@pytest.mark.parametrize("pes", [16, 32])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_the_load_balance_of_a_mask(density, pes):
    mask = synthetic_masks(["a"], heads=4, tokens=256, density=density)["a"].kept
    kept, all_valid = torch.from_numpy(mask).float(), torch.ones(1, 1, 256, 256)
    measured = theirs("modeling_sanger_spattn")._eval_load_balance(kept, all_valid, num_pes=pes, no_skip=False)
    assert sanger_load_balance(mask, pes) == pytest.approx(measured, rel=1e-5)


def test_its_variant_without_skipping_counts_the_occupied_tiles_for_the_empty_ones():
    mask = np.zeros((1, 1, 64, 64), bool)
    mask[..., :16, :16] = True  # 16 full sub-rows, 48 empty ones
    kept, all_valid = torch.from_numpy(mask).float(), torch.ones(1, 1, 64, 64)
    without = theirs("modeling_sanger_spattn")._eval_load_balance(kept, all_valid, no_skip=True)
    occupied = int(sub_rows(mask, 16).sum())
    assert occupied == 16
    assert without == occupied / (occupied + 16) != occupied / 64
