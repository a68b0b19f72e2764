"""Shift layers with int8 and float8 activations: the definition, the exact integer path, gradients, graphs, exports."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitrify.errors import InputError
from vitrify.ops import pack_codes, shift_decode, shift_linear, shift_quantize
from vitrify.ops.shift import cpu, quantize_tokens_ste, reference

KINDS = ["int8", "float8"]
kinds = pytest.mark.parametrize("kind", KINDS)


def layer(out: int = 7, width: int = 13, bits: int = 4, variant: str = "ps", seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return packed codes, exponent, bias and the decoded weight, float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width, generator=generator) * torch.logspace(-3, 3, out)[:, None]
    codes, exponent = shift_quantize(weight, bits, variant)
    decoded = shift_decode(codes, exponent, bits, variant)
    return pack_codes(codes, bits), exponent, torch.randn(out, generator=generator), decoded


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_int8_values_are_the_nearest_integers_with_ties_to_even():
    values, scale = reference.quantize_tokens(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0, 0, 0, 0, 0]]), "int8")
    assert values.tolist() == [[127, 0, 2, -2, -127], [0, 0, 0, 0, 0]]
    assert scale.tolist() == [[1], [1]]
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)


def test_float8_values_reach_the_largest_number_of_the_format():
    values, scale = reference.quantize_tokens(torch.tensor([[-896.0, 2.0, 2.125, 0.0]]), "float8")
    assert values.dtype == torch.float8_e4m3fn
    assert values.float().tolist() == [[-448, 1, 1, 0]]  # 1.0625 lies half-way from 1 to 1.125, and 1 is even
    assert scale.tolist() == [[2]]


@kinds
@settings(deadline=None)
@given(seed=st.integers(0, 2**31), power=st.integers(-140, 120), width=st.integers(1, 40))
def test_quantised_tokens_are_close_at_every_magnitude(kind, seed, power, width):
    input = tokens(3, width, seed=seed) * 2.0**power
    values, scale = reference.quantize_tokens(input, kind)
    # Half a step: of E4M3 a 16th of a normal number, and 2^-10 below those.
    half = torch.tensor(0.5) if kind == "int8" else (values.double().abs() / 16).clamp(min=2.0**-10)
    step = half * scale.double()
    error = (values.double() * scale.double() - input.double()).abs()
    usable = input.abs().amax(-1, keepdim=True) / reference.LARGEST[kind] >= torch.finfo(torch.float32).tiny
    assert (error <= 1.001 * step)[usable.expand_as(error)].all()
    assert (values.float()[~usable.expand_as(error)].abs() <= 1e-30).all()
    assert values.float().abs().max() <= reference.LARGEST[kind]


@kinds
def test_what_is_not_finite_spoils_its_own_token_only(kind):
    codes, exponent, bias, _ = layer()
    input = tokens(4, 13)
    expected = shift_linear(input, codes, exponent, bias, activations=kind)
    input[0, 0], input[1, 3] = float("nan"), float("inf")
    out = shift_linear(input, codes, exponent, bias, activations=kind)
    assert out[:2].isnan().all()
    assert torch.equal(out[2:], expected[2:])


@pytest.mark.parametrize(("bits", "variant"), [(3, "ps"), (3, "q"), (4, "ps"), (4, "q"), (5, "ps"), (6, "q")])
def test_int8_sums_are_exact(bits, variant):
    """Against rational arithmetic, rounded to float32 once for the sum and once for the scale."""
    codes, exponent, _, weight = layer(5, 33, bits, variant)
    input = tokens(3, 33)
    values, scale = reference.quantize_tokens(input, "int8")
    for out in (
        shift_linear(input, codes, exponent, bits=bits, variant=variant, activations="int8"),
        reference.linear(input, codes, exponent, None, bits, variant, "int8"),
    ):
        for token in range(3):
            for channel in range(5):
                products = zip(values[token].tolist(), weight[channel].tolist(), strict=True)
                exact = sum(Fraction(v) * Fraction(w) for v, w in products)
                expected = torch.tensor(float(exact), dtype=torch.float64).float() * scale[token, 0]
                assert out[token, channel] == expected


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 200),
    out=st.integers(1, 40),
    bits=st.sampled_from([3, 4]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_the_integer_path_has_the_bits_of_the_definition(rows, width, out, bits, seed, dtype):
    codes, exponent, bias, _ = layer(out, width, bits, seed=seed)
    input, bias = tokens(rows, width, seed=seed).to(dtype), bias.to(dtype)
    assert cpu.as_integers(codes, exponent, width, bits, "ps") is not None
    expected = reference.linear(input, codes, exponent, bias, bits, "ps", "int8")
    assert torch.equal(shift_linear(input, codes, exponent, bias, bits=bits, activations="int8"), expected)


def test_integers_are_the_weight_in_units_of_a_power_of_two():
    codes, exponent, _, weight = layer()
    integers, unit = cpu.as_integers(codes, exponent, 13, 4, "ps")
    assert torch.equal(integers.t().float() * unit[:, None], weight)
    assert integers.abs().max() <= 64
    assert set(integers.abs().unique().tolist()) <= {0, 1, 2, 4, 8, 16, 32, 64}
    row = torch.tensor([[0.0, 0.0], [2.0**-3, -(2.0**3)], [2.0**-4, 2.0**3]])
    codes, exponent = shift_quantize(row, 5)
    packed = pack_codes(codes, 5)
    assert cpu.as_integers(packed, exponent, 2, 5, "ps") is None  # 2^7 apart
    integers, unit = cpu.as_integers(packed[:2], exponent[:2], 2, 5, "ps")
    assert integers.t().tolist() == [[0, 0], [1, -64]]
    assert unit.tolist() == [1, 0.125]


WORST = """
import torch
rows, width, out = 24, 256, 24
for value in (127, -127):
    for weight in (64, -64):
        left = torch.full((rows, width), value, dtype=torch.int8)
        right = torch.full((out, width), weight, dtype=torch.int8)
        assert (torch._int_mm(left, right.t()) == value * weight * width).all(), (value, weight)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_the_integer_product_does_not_saturate_on_older_cpus(isa):
    """oneDNN can be told to use no VNNI: then pairs of products are added in saturating 16 bits."""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
    command = [sys.executable, "-W", "error", "-c", WORST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_and_shapes(dtype, kind):
    codes, exponent, bias, weight = layer()
    input = tokens(2, 5, 13).to(dtype)
    out = shift_linear(input, codes, exponent, bias.to(dtype), activations=kind)
    values, scale = reference.quantize_tokens(input, kind)
    exact = F.linear(values.double() * scale.double(), weight.double(), bias.to(dtype).double())
    assert (out.dtype, out.shape) == (dtype, (2, 5, 7))
    torch.testing.assert_close(out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-5 * exact.abs().max())
    assert torch.equal(shift_linear(input[0, 0], codes, exponent, bias.to(dtype), activations=kind), out[0, 0])
    assert shift_linear(input[:0], codes, exponent, bias.to(dtype), activations=kind).shape == (0, 5, 7)


@kinds
@pytest.mark.parametrize("shape", [(0, 13), (3, 0), (0, 0), (2, 0, 13), (2, 3, 0)], ids=str)
@pytest.mark.parametrize("out", [5, 0])
def test_nothing_in_or_out(shape, out, kind):
    """What a token without inputs sums up to is its bias."""
    codes = pack_codes(torch.full((out, shape[-1]), 7, dtype=torch.uint8))
    bias = torch.arange(float(out))
    result = shift_linear(torch.ones(shape), codes, torch.zeros(out, dtype=torch.int8), bias, activations=kind)
    assert result.shape == (*shape[:-1], out)
    assert torch.equal(result, bias.expand_as(result))
    assert quantize_tokens_ste(torch.ones(shape), kind).shape == shape


@kinds
def test_gradients_are_those_of_float_activations(kind):
    codes, exponent, bias, _ = layer()
    leaves = [tokens(3, 13).requires_grad_(), bias.requires_grad_()]
    upstream = tokens(3, 7, seed=2)
    expected = torch.autograd.grad(shift_linear(leaves[0], codes, exponent, leaves[1]), leaves, upstream)
    out = shift_linear(leaves[0], codes, exponent, leaves[1], activations=kind)
    for a, e in zip(torch.autograd.grad(out, leaves, upstream), expected, strict=True):
        assert torch.equal(a, e)


@kinds
def test_ste_rounds_forward_and_passes_the_gradient_on(kind):
    input = tokens(3, 13).requires_grad_()
    values, scale = reference.quantize_tokens(input.detach(), kind)
    out = quantize_tokens_ste(input, kind)
    assert torch.equal(out, values.float() * scale)
    upstream = tokens(3, 13, seed=2)
    (grad,) = torch.autograd.grad(out, input, upstream)
    assert torch.equal(grad, upstream)
    assert quantize_tokens_ste(input, "float") is input
    with torch.autocast("cpu", torch.bfloat16):
        assert quantize_tokens_ste(input, kind).dtype == torch.bfloat16


@kinds
def test_opcheck(kind):
    codes, exponent, bias, _ = layer()
    arguments = (tokens(2, 13).requires_grad_(), codes, exponent, bias.requires_grad_(), 4, "ps", kind)
    torch.library.opcheck(torch.ops.vitrify.shift_linear.default, arguments)


class Packed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        codes, exponent, bias, _ = layer()
        self.register_buffer("codes", codes)
        self.register_buffer("exponent", exponent)
        self.bias = nn.Parameter(bias)

    def forward(self, input):
        return shift_linear(input, self.codes, self.exponent, self.bias, activations=self.kind)


@kinds
def test_compile_fullgraph(kind):
    module, input = Packed(kind), tokens(3, 13)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(input), module(input))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_ste_passes_the_gradient_on(kind, dtype):
    """torch 2.11 returned zeros wherever the last operation, a cast, had nothing to do."""
    input, upstream = tokens(3, 13).to(dtype).requires_grad_(), tokens(3, 13, seed=2).to(dtype)
    out = torch.compile(quantize_tokens_ste, fullgraph=True, backend="aot_eager")(input, kind)
    assert torch.equal(out, quantize_tokens_ste(input, kind))
    assert torch.equal(*torch.autograd.grad(out, input, upstream), upstream)


@kinds
def test_autocast_computes_in_its_dtype(kind):
    module, input = Packed(kind), tokens(3, 13)
    expected = shift_linear(input.bfloat16(), module.codes, module.exponent, module.bias.bfloat16(), activations=kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(input), expected)


@kinds
def test_export_holds_plain_aten_only(kind):
    module, input = Packed(kind), tokens(3, 13)
    program = torch.export.export(module, (input,), dynamic_shapes={"input": {0: torch.export.Dim.AUTO}})
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not any("vitrify" in target for target in targets)
    other = tokens(5, 13, seed=3)
    torch.testing.assert_close(program.module()(other), module(other))


@pytest.mark.slow
@kinds
def test_onnx_computes_the_same(kind, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, input = Packed(kind).eval(), tokens(3, 13)
    path = tmp_path / "shift.onnx"
    shapes = {"input": {0: torch.export.Dim("batch")}}
    torch.onnx.export(module, (input,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    other = tokens(5, 13, seed=3)
    (out,) = runtime.InferenceSession(path).run(None, {"input": other.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), module(other).detach())


def test_unknown_activations_are_refused():
    codes, exponent, bias, _ = layer()
    with pytest.raises(InputError, match=r"unknown activations 'int4'.* Known: float, float8, int8"):
        shift_linear(tokens(2, 13), codes, exponent, bias, activations="int4")
    with pytest.raises(InputError, match="unknown activations 'fp8'"):
        quantize_tokens_ste(tokens(2, 13), "fp8")
