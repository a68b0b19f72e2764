"""Runs the Triton kernel of mixtures' weight gradients in the interpreter; its tiles, and how its tokens are shared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from vitrify.ops.ahead_of_time import ARCHITECTURES, GRID_LIMIT, SMALL_SHARED, compiled, recorded_launches
from vitrify.ops.experts import triton, triton_gradient
from vitrify.ops.experts.triton_gradient import Tiles, gradient, shares, tiles

CASES = Path(__file__).with_name("experts_gradient_cases.py")
BF16 = torch.bfloat16


@pytest.mark.slow
def test_every_case_in_the_interpreter():
    # A process of its own: Triton decides at its import whether it interprets.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    command = [sys.executable, "-m", "pytest", *options, str(CASES)]
    environment = kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def launch(tokens, width, columns, dtype=BF16, trained=2):
    """Return the launch of a gradient on meta tensors, and the shapes and dtypes of its results."""

    def empty(*shape, of=dtype):
        return torch.empty(*shape, dtype=of, device="meta")

    places = (empty(tokens, of=torch.int32), empty(2, of=torch.int32))
    with recorded_launches() as launches:
        results = gradient(empty(tokens, columns), empty(tokens, width), *places, True, False, trained)
    return launches[0], [(tuple(t.shape), t.dtype) for t in results]


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16, 16), (1000, 75, 70), (50_432, 192, 768), (10**6, 768, 3072)])
def test_every_weight_has_its_programs(shape, dtype):
    _, width, columns = shape
    recorded, results = launch(*shape, dtype)
    tile, count = tiles(width, columns, dtype), recorded.arguments[-2]
    assert recorded.grid == (-(-columns // tile.columns) * (-(-width // tile.inputs) + 1), count, 2)
    assert all(size <= limit for size, limit in zip(recorded.grid, GRID_LIMIT, strict=True))
    assert results == [((2, columns, width), dtype), ((2, columns), dtype)]
    # Parts are joined in float32.
    assert recorded.arguments[6].dtype == (dtype if count == 1 else torch.float32)


def test_tokens_are_shared_where_the_weight_is_too_small_to_fill_a_gpu():
    def found(tokens, width, columns):
        return shares(tokens, width, columns, 2, tiles(width, columns, BF16), 132)

    assert found(12_608, 768, 3072) == found(197, 192, 192) == found(0, 192, 192) == 1
    assert found(12_608, 192, 768) > 1
    assert found(12_608, 192, 192) > found(1576, 192, 192) > 1
    programs = 2 * found(12_608, 192, 768) * (768 // 64) * (192 // 64)
    assert 66 < programs <= 4 * 132


def test_tiles_waste_less_than_half_of_a_weight():
    assert tiles(768, 3072, BF16)[:2] == (128, 128)
    assert tiles(192, 768, BF16)[:2] == tiles(768, 192, BF16)[:2] == (64, 64)
    assert tiles(208, 208, BF16)[:2] == (128, 128)
    assert tiles(75, 64, BF16)[:2] == tiles(64, 75, BF16)[:2] == (32, 32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_two_programs_fit_a_processor(arch):
    """By registers and shared memory, for the weights of a ViT-B; on 8.0 only one does."""
    found = compiled(launch(12_608, 768, 3072)[0], arch)
    assert found.stack == found.local == 0
    assert found.registers <= (192 if arch == 80 else 128)
    assert found.shared <= SMALL_SHARED
    assert found.tensor_core() == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]


def test_float32_keeps_its_digits_unless_pytorch_gives_them_up(monkeypatch):
    """A step without tensor cores has as many instructions that multiply and add as it must, and few that load."""
    monkeypatch.setattr(triton_gradient, "precision", lambda dtype: "ieee")
    exact = compiled(launch(1576, 768, 3072, torch.float32)[0], 90)
    assert exact.tensor_core() == ""
    assert exact.instructions["FFMA"] == 64 * 64 * 16 / exact.threads
    assert exact.instructions["FFMA"] > 5 * exact.instructions["LDS"]
    monkeypatch.setattr(triton_gradient, "precision", lambda dtype: "tf32")
    assert compiled(launch(1576, 768, 3072, torch.float32)[0], 90).tensor_core() == "HGMMA"


def test_what_pytorch_lets_float32_be_multiplied_as():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in ("tf32", "ieee"):
            matmul.fp32_precision = allowed
            assert triton.precision(torch.float32) == allowed
            assert triton.precision(torch.float16) == "ieee"
            assert triton.tiles(12_608, 768, 3072, 132, packed=False, dtype=torch.float32).step == (
                32 if allowed == "tf32" else 16
            )
            assert tiles(768, 3072, torch.float32) == Tiles(64, 64, 32 if allowed == "tf32" else 16, 4)
    finally:
        matmul.fp32_precision = before
