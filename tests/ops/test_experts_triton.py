"""Runs the Triton kernels of mixtures in the interpreter, and compiles them for GPUs that are not there."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from vitrify.ops.ahead_of_time import ARCHITECTURES, GRID_LIMIT, SHARED_LIMIT, compiled, recorded_launches
from vitrify.ops.experts import triton
from vitrify.ops.experts.triton import Tiles, tiles
from vitrify.ops.shift.packing import packed_width

CASES = Path(__file__).with_name("experts_triton_cases.py")


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


def launches(tokens, width, columns, *, bits=4, variant="ps", dtype=torch.bfloat16, activations="float"):
    """Return what a mixture of linear layers launches, recorded on meta tensors; the last is its product."""

    def empty(*shape, of=dtype):
        return torch.empty(*shape, dtype=of, device="meta")

    codes = empty(columns, packed_width(width, bits), of=torch.uint8)
    with recorded_launches() as recorded:
        x = empty(tokens, width)
        order, counts = triton.order_tokens(x, empty(2, width), empty(2))
        layers = (empty(columns, width), empty(columns), codes, empty(columns, of=torch.int8), empty(columns))
        triton.linear(x, order, counts, *layers, bits, variant, activations, True, True)
    return recorded


def test_launches_follow_from_shapes_alone():
    few, many = launches(197, 768, 3072), launches(12_608, 768, 3072)
    assert [launch.name for launch in few] == ["choose_kernel", "place_kernel", "linear_kernel"]
    assert [launch.name for launch in many] == ["choose_kernel", "place_kernel", "decode_kernel", "linear_kernel"]
    assert few[-1].keywords["PACKED"]
    assert not many[-1].keywords["PACKED"]


@pytest.mark.parametrize(("activations", "opcode"), [("int8", "IGMMA"), ("float8", "QGMMA")])
def test_one_launch_multiplies_and_shifts_each_in_its_own_format(activations, opcode):
    few, many = (launches(tokens, 768, 3072, activations=activations) for tokens in (197, 12_608))
    assert [launch.name for launch in few] == ["choose_kernel", "place_kernel", "quantize_kernel", "linear_kernel"]
    assert [launch.name for launch in many[2:]] == ["quantize_kernel", "decode_kernel", "linear_kernel"]
    found = compiled(few[-1], 90)
    assert {"HGMMA", opcode} <= found.instructions.keys()
    assert found.stack == found.local == 0


@pytest.mark.parametrize(
    ("version", "capability", "rounds"),
    [("3.6.0", (10, 0), True), ("3.6.0", (9, 0), False), ("3.9.0", (10, 0), False)],
)
def test_float32_is_not_decoded_in_registers_where_that_rounds_it_to_tf32(monkeypatch, version, capability, rounds):
    monkeypatch.setattr(triton.triton, "__version__", version)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = triton._rounds_widened.__wrapped__(torch.device("cuda"))
    assert found == rounds
    monkeypatch.setattr(triton, "_rounds_widened", lambda device: found)
    assert launches(197, 768, 3072, dtype=torch.float32)[-1].keywords["PACKED"] != rounds
    assert launches(197, 768, 3072, dtype=torch.bfloat16)[-1].keywords["PACKED"]


@pytest.mark.parametrize("columns", [64, 768, 3072, 4096])
@pytest.mark.parametrize("tokens", [1, 63, 64, 197, 577, 1576, 12_608, 50_432, 10**6])
def test_every_split_fits_the_grid(tokens, columns):
    for packed in (True, False):
        tile = tiles(tokens, 768, columns, 132, packed=packed)
        rows = tile.tokens
        firsts = {0, 1, rows - 1, rows, rows + 1, tokens // 2, tokens - 1, tokens}
        needed = max(-(-first // rows) + -(-(tokens - first) // rows) for first in firsts if 0 <= first <= tokens)
        assert needed <= triton._token_tiles(tokens, rows)
        assert triton._token_tiles(tokens, rows) * -(-columns // tile.columns) <= GRID_LIMIT[0]


def test_tiles_grow_with_the_tokens():
    found = [tiles(n, 768, 3072, 132, packed=False).tokens for n in (400, 1576, 12_608)]
    assert found == sorted(found)
    assert found[-1] == 256
    assert tiles(64, 3072, 768, 132, packed=True).tokens == 16
    assert tiles(12_608, 33, 3072, 132, packed=False).tokens == 32
    single = {tiles(2**n, width, 3072, 132, packed=False, dtype=FP32).tokens for n in range(16) for width in (33, 768)}
    assert single == {16, 64, 128}


@functools.cache
def product(arch, tile, width, bits, variant, dtype, packed):
    """Compile the product with a given tile, one that `tiles` gives."""
    counts = [2**n for n in range(16)]
    given = (tiles(n, width, outputs, 132, packed=packed, dtype=dtype) for n in counts for outputs in (768, 3072))
    assert tile in set(given)
    launch = launches(100 if packed else 1000, width, 3072, bits=bits, variant=variant, dtype=dtype)[-1]
    shape = {"BLOCK_M": tile.tokens, "BLOCK_N": tile.columns, "BLOCK_K": tile.step, "num_warps": tile.warps}
    keywords = launch.keywords | shape | {"WHOLE": width % tile.step == 0}
    assert keywords["PACKED"] == packed
    return compiled(launch._replace(keywords=keywords), arch)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (tile, width, bits, variant, dtype, whether codes are decoded in registers), and the most registers by architecture
BUDGETS = [
    ((Tiles(256, 128, 64, 8), 768, 4, "ps", BF16, False), {80: 255, 90: 200, 100: 200}),
    ((Tiles(128, 128, 64, 8), 768, 4, "ps", BF16, False), {80: 184, 90: 128, 100: 128}),
    ((Tiles(32, 128, 64, 8), 33, 4, "ps", FP16, False), {80: 240, 90: 144, 100: 144}),
    ((Tiles(128, 64, 64, 4), 768, 4, "ps", BF16, True), {80: 224, 90: 168, 100: 128}),
    ((Tiles(64, 64, 128, 4), 768, 4, "ps", BF16, True), {80: 168, 90: 168, 100: 128}),
    ((Tiles(16, 64, 128, 4), 768, 4, "ps", BF16, True), {80: 104, 90: 104, 100: 104}),
    ((Tiles(128, 64, 64, 4), 320, 6, "q", FP16, True), {80: 255, 90: 168, 100: 128}),
    ((Tiles(32, 64, 64, 4), 33, 6, "q", FP16, True), {80: 224, 90: 216, 100: 184}),
    ((Tiles(128, 64, 16, 8), 768, 4, "ps", FP32, False), {80: 128, 90: 144, 100: 128}),
    ((Tiles(64, 64, 16, 4), 768, 4, "ps", FP32, True), {80: 168, 90: 128, 100: 128}),
    ((Tiles(16, 64, 16, 4), 33, 6, "q", FP32, True), {80: 128, 90: 128, 100: 128}),
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("case", "registers"), BUDGETS, ids=str)
def test_the_product_stays_in_its_budget(case, registers, arch):
    found = product(arch, *case)
    assert found.stack == found.local == 0
    assert found.registers <= registers[arch]
    assert found.shared <= SHARED_LIMIT[arch]
    exact = FP32 in case
    assert found.tensor_core() == ("" if exact else {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch])


def test_a_product_by_default():
    """The one that ViT-B's fc1 gets at batch 64, for an H100: two programs' worth of accumulators, nothing spilled."""
    found = product(90, *BUDGETS[0][0])
    assert found.registers <= 200
    assert found.stack == found.local == 0
    assert found.tensor_core() == "HGMMA"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_kernels_that_order_tokens(arch):
    for launch in launches(12_608, 768, 3072)[:2]:
        found = compiled(launch, arch)
        assert found.stack == found.local == 0
        assert found.registers <= 168
        assert found.shared <= 8192
        assert not any(name.startswith(("ATOM", "RED")) for name in found.instructions if name != "REDUX")
