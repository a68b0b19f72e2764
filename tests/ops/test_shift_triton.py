"""Runs the Triton kernels of shift layers in the interpreter, and checks the plan and what the compiler makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') == '1'", reason="the interpreter compiles nothing")

from vitrify.ops.ahead_of_time import compiled, recorded_launches  # noqa: E402
from vitrify.ops.shift import triton  # noqa: E402
from vitrify.ops.shift.plan import STEP_BYTES  # noqa: E402

CASES = Path(__file__).with_name("shift_triton_cases.py")
# ViT-Ti/S/B/L: (in, out) of fc1 and fc2.
LAYERS = [layer for d in (192, 384, 768, 1024) for layer in ((d, 4 * d), (4 * d, d))]
ROWS = (1, 15, 16, 17, 64, 197, 512)


@pytest.mark.slow
def test_every_case_in_the_interpreter():
    """In a process of its own: Triton decides at its import whether it interprets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON"))}
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=0", CASES)
    environment = kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout


def launches(tokens, width, channels, *, dtype=torch.bfloat16, bits=4, variant="ps", activations="float", rounded=None):
    """Return the recorded launches of a layer on meta tensors; of one whose tokens are `rounded`, a dtype, already."""
    inputs, codes, exponent, bias = (
        torch.empty(shape, dtype=kind, device="meta")
        for shape, kind in (
            ((tokens, width), dtype),
            ((channels, -(-width // 2) if bits <= 4 else width), torch.uint8),
            ((channels,), torch.int8),
            ((channels,), dtype),
        )
    )
    with recorded_launches() as found:
        if rounded is None:
            out = triton.linear(inputs, codes, exponent, bias, bits, variant, activations)
        else:
            scale = torch.empty(tokens, 1, device="meta")
            out = triton.rounded_linear(inputs.to(rounded), scale, codes, exponent, bias, bits, variant, dtype)
    assert out.shape == (tokens, channels)
    return found


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
@pytest.mark.parametrize("processors", [1, 108, 132])
def test_the_plan_covers_every_input_once(layer, item_bytes, processors):
    width, channels = layer
    for tokens in ROWS:
        plan = triton.plan(tokens, width, channels, item_bytes, processors)
        share = plan.block_in * plan.steps
        chunks = -(-width // share)
        assert chunks * share >= width > (chunks - 1) * share
        assert width % plan.block_in == 0  # no masks at these widths
        assert plan.block_tokens * plan.block_in * item_bytes <= STEP_BYTES
        tiles = -(-tokens // plan.block_tokens) * (channels // triton.BLOCK_OUT)
        assert chunks == 1 or tiles * chunks <= processors


def test_the_plan_divides_only_what_is_long_and_leaves_processors_idle():
    def chunks(tokens, width, channels, processors=132):
        plan = triton.plan(tokens, width, channels, 2, processors)
        return -(-width // (plan.block_in * plan.steps))

    assert chunks(64, 3072, 768) > 4
    assert chunks(64, 768, 3072) == 1
    assert chunks(64, 3072, 768) > chunks(197, 3072, 768)
    assert chunks(512, 3072, 768, processors=16) == 1


@pytest.mark.parametrize(
    ("tokens", "activations", "bits", "expected"),
    [
        (64, "float", 4, ["multiply_kernel"]),
        (513, "float", 4, ["decode_kernel"]),
        (64, "float8", 5, ["quantize_kernel", "multiply_kernel"]),
        (513, "float8", 5, ["quantize_kernel", "decode_kernel"]),
        (513, "float8", 6, ["quantize_kernel", "multiply_kernel"]),
        (64, "int8", 4, ["quantize_kernel", "multiply_kernel"]),
        (513, "int8", 4, ["quantize_kernel", "decode_kernel", "combine_kernel"]),
        (513, "int8", 5, []),
    ],
)
def test_which_kernels_make_up_a_layer(tokens, activations, bits, expected):
    assert [launch.name for launch in launches(tokens, 768, 3072, bits=bits, activations=activations)] == expected


@pytest.mark.parametrize(
    ("tokens", "kind", "bits", "expected"),
    [
        (64, torch.float8_e4m3fn, 5, ["multiply_kernel"]),
        (513, torch.float8_e4m3fn, 5, ["decode_kernel"]),
        (513, torch.float8_e4m3fn, 6, ["multiply_kernel"]),
        (64, torch.int8, 4, ["multiply_kernel"]),
        (513, torch.int8, 4, ["decode_kernel", "combine_kernel"]),
        (513, torch.int8, 5, []),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [768, 75])
def test_rounded_tokens_are_not_rounded_again(tokens, kind, bits, expected, width):
    assert [launch.name for launch in launches(tokens, width, 3072, bits=bits, rounded=kind)] == expected


def test_float8_without_e4m3_and_odd_outputs_take_the_first_path(monkeypatch):
    names = [launch.name for launch in launches(513, 75, 70, bits=5, activations="float8")]
    assert names == ["quantize_kernel", "multiply_kernel"]
    monkeypatch.setattr(triton, "has_e4m3", lambda device: False)
    _, multiply = launches(513, 768, 3072, bits=5, activations="float8")
    assert str(multiply.keywords["KIND"]) == "bf16"


def test_token_counts_share_their_binaries():
    """What the compiler is told of 65 to 512 tokens is the same: numbers of tokens and of steps are not in its key."""

    def key(tokens):
        (launch,) = launches(tokens, 768, 3072)
        names = launch.kernel.arg_names
        special = {p.name for p in launch.kernel.params if p.do_not_specialize}
        values = zip(names, launch.arguments, strict=False)
        told = [value for name, value in values if name not in special and not isinstance(value, torch.Tensor)]
        return told, sorted(launch.keywords.items(), key=str)

    assert key(65) == key(128) == key(197) == key(512)
    assert key(64) != key(65)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "bits", "activations", "opcodes"),
    [
        (torch.bfloat16, 4, "float", ("HMMA", "HGMMA", "UTCHMMA")),
        (torch.float16, 4, "float", ("HMMA", "HGMMA", "UTCHMMA")),
        (torch.float32, 4, "float", ("HMMA", "HGMMA", "UTCHMMA")),
        (torch.bfloat16, 5, "float8", (None, "QGMMA", "UTCQMMA")),
        (torch.bfloat16, 4, "int8", ("IMMA", "IGMMA", "UTCIMMA")),
    ],
)
def test_tensor_cores_and_copies_ahead(dtype, bits, activations, opcodes, arch):
    """Each type has its own instruction, and codes and inputs are copied to shared memory while others are used."""
    opcode = opcodes[(80, 90, 100).index(arch)]
    if opcode is None:
        return  # the GPU has no E4M3, and the layer another path
    found = compiled(launches(64, 768, 3072, dtype=dtype, bits=bits, activations=activations)[-1], arch)
    assert found.tensor_core() == opcode
    assert found.instructions["LDGSTS"] >= triton.STAGES - 1
    assert (found.stack, found.local) == (0, 0)


def test_decoding_in_registers_takes_few_instructions():
    """On an H100: 64 weights per thread and step, 9 instructions for two, beside 800 that are no decoding.

    Nothing but the result goes through shared memory by stores: the weights feed the tensor cores from registers.
    """
    (launch,) = launches(64, 768, 3072)
    found = compiled(launch, 90)
    assert sum(found.instructions.values()) < 9 * 32 + 850
    assert found.instructions["STS"] <= 16
    assert found.instructions["HGMMA"] == 8
    assert found.registers <= 168, "three programs on a processor"
