"""The Triton kernels of shift layers: in the interpreter if TRITON_INTERPRET=1, else on the GPU.

`test_shift_triton.py` runs this file in a process of its own, because Triton decides at import whether it interprets;
`test_shift_triton_gpu.py` imports its tests.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from any_shape import ANY
from hypothesis import given
from hypothesis import strategies as st

from vitrify.ops import pack_codes, shift_quantize
from vitrify.ops.shift import reference, triton
from vitrify.ops.shift.plan import Plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
E4M3 = INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9))
# What holds the values of E4M3: the format itself, where the GPU has it, and bfloat16.
E4M3_KINDS = [torch.float8_e4m3fn] * E4M3 + [torch.bfloat16]
FORMATS = [(bits, variant) for bits in (3, 4, 5, 6) for variant in ("ps", "q")]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
formats = pytest.mark.parametrize(("bits", "variant"), FORMATS)
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)

# (tokens, in, out): one token, tiles that end early, widths that are odd, steps without masks.
SHAPES = [(1, 75, 5), (63, 64, 70), (197, 130, 66)]
if not INTERPRETED:
    SHAPES += [(tokens, 768, 3072) for tokens in (1, 63, 64, 197, 512, 577)] + [(8, 4096, 1024), (197, 192, 768)]

MOST = 150 if INTERPRETED else 1500


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer(width, channels, bits=4, variant="ps"):
    """Return packed codes and exponents of normal weights whose rows differ in size."""
    weight = numbers(channels, width, seed=1) * 0.1 * 2.0 ** (torch.arange(channels) % 7 - 4)[:, None]
    codes, exponent = shift_quantize(weight, bits, variant)
    return pack_codes(codes, bits), exponent


def run(input, codes, exponent, bias=None, bits=4, variant="ps", activations="float"):
    """Return what the kernels compute, on the CPU."""
    tensors = (None if t is None else t.to(DEVICE) for t in (input, codes, exponent, bias))
    return triton.linear(*tensors, bits, variant, activations).cpu()


def step(dtype):
    """Return the relative error of rounding to `dtype`; the interpreter cuts bfloat16 off."""
    return torch.finfo(dtype).eps * (1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.5)


def check(input, codes, exponent, bias, bits, variant):
    """Compare with float64 on the very weights: twice plain float32's error, and the rounding of the result.

    Tensor cores cut their float32 sums off instead of rounding them: 2^-22 of the largest one, at steps of 16 inputs,
    three times for float32 inputs.
    """
    truth, plain = (
        reference.linear(input.to(t), codes, exponent, bias.to(t), bits, variant, "float")
        for t in (torch.float64, torch.float32)
    )
    actual = run(input, codes, exponent, bias, bits, variant)
    assert actual.dtype == input.dtype
    largest = truth.abs().max()
    cut = 0.0 if INTERPRETED else 2**-22 * 3 * input.shape[-1] / 16
    allowed = 2 * (plain - truth).abs().max() + cut * largest + step(input.dtype) * truth.abs()
    assert ((actual.double() - truth).abs() <= allowed).all()


def definition(bits, variant, exponent):
    """Return float64 (len(exponent), 2^bits): what every code stands for, from the format's formula."""
    code, top = torch.arange(2**bits), 2 ** (bits - 1) - 1
    level = code & top
    power = exponent.long()[:, None] - top + level
    value = torch.ldexp(torch.ones_like(power, dtype=torch.float64), power)
    value = torch.where(code > top, -value, value)
    return value.masked_fill(level == 0, 0) if variant == "ps" else value


def every_code(bits, variant):
    """Return packed codes (exponents, all codes), every exponent that the format allows, and the definition."""
    exponent = torch.arange(*reference.exponent_limits(torch.float32, bits, variant)).to(torch.int8)
    exponent = torch.cat([exponent, torch.tensor([127], dtype=torch.int8)])
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(len(exponent), 1)
    return pack_codes(codes, bits), exponent, definition(bits, variant, exponent)


@pytest.mark.usefixtures("nan_poison")
@formats
def test_every_code_with_every_exponent(bits, variant):
    codes, exponent, truth = every_code(bits, variant)
    for dtype in (*FLOATS, torch.float64):
        actual = triton.decoded(codes.to(DEVICE), exponent.to(DEVICE), 2**bits, bits, variant, dtype).cpu()
        assert actual.dtype == dtype
        assert torch.equal(actual, truth.to(dtype)), dtype


@pytest.mark.usefixtures("nan_poison")
@formats
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn] * E4M3 + [torch.int8], ids=str)
def test_every_code_in_eight_bits_times_its_channels_power(bits, variant, kind):
    shift = triton.power_shift(bits, variant, kind)
    levels = 2 ** (bits - 1) - (variant == "ps")
    assert (shift is None) == (levels > (18 if kind == torch.float8_e4m3fn else 7))
    if shift is None:
        return
    codes, exponent, truth = every_code(bits, variant)
    powers = torch.empty(1, len(exponent), device=DEVICE)
    weight = triton._decode(
        codes.to(DEVICE), exponent.to(DEVICE), powers, 2**bits, 2**bits + 5, bits, variant, kind, shift
    )
    wide = weight.cpu().to(torch.float64)
    assert torch.equal(wide[:, : 2**bits] * powers.cpu().double().t(), truth)
    assert wide.isfinite().all()


@pytest.mark.usefixtures("nan_poison")
@formats
@floats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, bits, variant):
    tokens, width, channels = shape
    input, bias = numbers(tokens, width, dtype=dtype), numbers(channels, seed=2, dtype=dtype)
    check(input, *layer(width, channels, bits, variant), bias, bits, variant)


@pytest.mark.usefixtures("nan_poison")
@ANY
@given(
    shape=st.tuples(*[st.integers(1, MOST)] * 3),
    form=st.sampled_from(FORMATS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, form, dtype, seed):
    tokens, width, channels = shape
    input, bias = numbers(tokens, width, seed=seed, dtype=dtype), numbers(channels, seed=seed + 1, dtype=dtype)
    check(input, *layer(width, channels, *form), bias, *form)


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("activations", ["float", "int8", "float8"])
@floats
def test_inputs_divided_between_programs(monkeypatch, dtype, activations):
    """Five chunks, the last one of a part of a step; integers lose nothing."""
    input, bias = numbers(20, 600, dtype=dtype), numbers(40, seed=2, dtype=dtype)
    codes, exponent = layer(600, 40)
    whole = run(input, codes, exponent, bias, activations=activations)
    plan = Plan(32, 128, 1)
    monkeypatch.setattr(triton, "plan", lambda *sizes: plan)
    if activations == "float":
        check(input, codes, exponent, bias, 4, "ps")
    divided = run(input, codes, exponent, bias, activations=activations)
    assert torch.equal(divided, run(input, codes, exponent, bias, activations=activations))
    if activations == "int8":
        assert torch.equal(divided, whole)
    else:
        close = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(divided, whole, rtol=close, atol=close * whole.abs().max().item())


@formats
def test_float16_has_infinities_and_subnormals_where_the_reference_has(bits, variant):
    """Weights of all sizes times 1: of one input, so that nothing is added to an infinity."""
    exponent = torch.arange(-28, 46 if bits == 6 else 30, 2 if bits == 6 else 1, dtype=torch.int8)
    codes = torch.arange(2**bits, dtype=torch.uint8)[:, None].expand(-1, len(exponent)).reshape(-1, 1)
    codes, exponent = pack_codes(codes, bits), exponent.repeat(2**bits)
    input = torch.ones(1, 1, dtype=torch.float16)
    expected = reference.linear(input, codes, exponent, None, bits, variant, "float")
    assert torch.equal(run(input, codes, exponent, None, bits, variant), expected)
    assert expected.isinf().any()


def test_float32_infinities_and_digits():
    """Every bit of a float32 arrives, and an infinite input gives what F.linear does."""
    codes, exponent = layer(3, 6)
    input = torch.tensor([[1 + 2**-23, 0, 0], [3.4028235e38, 0, 0], [1, float("inf"), 0], [0, -1, float("nan")]])
    expected = reference.linear(input, codes, exponent, None, 4, "ps", "float")
    assert torch.equal(run(input, codes, exponent).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_tokens_are_rounded_as_the_reference_does(kind, dtype):
    input = numbers(9, 75, dtype=dtype)
    input[1] = 0
    input[2, 3] = float("nan")
    input[3, 3] = float("inf")
    input[4] *= 1e-30
    input[5] = torch.arange(-37, 38) * (127 if kind == "int8" else 448) / 74  # ties
    input[6] = input[6].sign() * 2.0 ** torch.arange(-20, 17.5, 0.5)[:75].clamp(max=8)
    expected, expected_scale = reference.quantize_tokens(input, kind)
    value_kinds = [torch.int8] if kind == "int8" else E4M3_KINDS
    for value_kind in value_kinds:
        values, scale = triton.quantize_tokens(input.to(DEVICE), value_kind, 80, reference.LARGEST[kind])
        assert values.dtype == value_kind
        assert torch.equal(scale.cpu()[:, None].nan_to_num(7), expected_scale.nan_to_num(7))
        wide = values.cpu().float()
        finite = torch.tensor([0, 1, 4, 5, 6, 7, 8])
        assert torch.equal(wide[finite, :75], expected.float()[finite])
        assert (wide[finite, 75:] == 0).all()


@pytest.mark.parametrize("value_kind", E4M3_KINDS, ids=str)
def test_every_float16_rounded_to_e4m3(value_kind):
    """All that lie below 448, in one token whose scale is 1."""
    bits = torch.arange(2**15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[halves <= 448]
    input = torch.cat([halves, -halves])[None]
    values, scale = triton.quantize_tokens(input.to(DEVICE), value_kind, input.shape[1], 448)
    assert scale.item() == 1
    assert torch.equal(values.cpu().float(), input.to(torch.float8_e4m3fn).float())


ROADS = [
    (activations, road, dtype)
    for activations in ("int8", "float8")
    for road in ("registers", "memory", "bfloat16")
    for dtype in FLOATS
    # On a CPU torch has no product with scales of rows and columns.
    if not (INTERPRETED and (activations, road, dtype) == ("float8", "memory", torch.bfloat16))
    if E4M3 or activations == "int8" or road == "bfloat16"
]


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize(("activations", "road", "dtype"), ROADS, ids=str)
@formats
def test_quantised_activations(monkeypatch, dtype, bits, variant, activations, road):
    """int8 has the reference's bits; float8 its sums but for their order, from registers, or by torch's products."""
    if road == "memory":
        monkeypatch.setattr(triton, "MOST_TOKENS", 16)
    monkeypatch.setattr(triton, "has_e4m3", lambda device: road != "bfloat16")
    input, bias = numbers(2, 17, 75, dtype=dtype), numbers(48, seed=2, dtype=dtype)
    codes, exponent = layer(75, 48, bits, variant)
    actual = run(input, codes, exponent, bias, bits, variant, activations)
    expected = reference.linear(input, codes, exponent, bias, bits, variant, activations)
    assert actual.dtype == dtype
    assert actual.shape == (2, 17, 48)
    rounding = step(dtype) * 2 * expected.abs() if dtype == torch.bfloat16 or activations == "float8" else 0
    # A Hopper adds E4M3 products with 14 bits.
    sums = 0.0 if activations == "int8" else (2**-18 if INTERPRETED else 2**-11) * expected.abs().max()
    assert ((actual.double() - expected.double()).abs() <= rounding + sums).all()


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize(("activations", "road", "dtype"), ROADS, ids=str)
@pytest.mark.parametrize(("bits", "variant"), [(4, "ps"), (4, "q"), (6, "ps")])
@pytest.mark.parametrize("width", [75, 64])
def test_tokens_that_are_rounded_already(monkeypatch, dtype, bits, variant, activations, road, width):
    """The definition's values and scales, transposed in memory too, give the bits of the kernels' own."""
    if road == "memory":
        monkeypatch.setattr(triton, "MOST_TOKENS", 16)
    monkeypatch.setattr(triton, "has_e4m3", lambda device: road != "bfloat16")
    input, bias = numbers(2, 17, width, dtype=dtype), numbers(48, seed=2, dtype=dtype)
    codes, exponent = layer(width, 48, bits, variant)
    expected = run(input, codes, exponent, bias, bits, variant, activations)
    values, scale = (t.to(DEVICE) for t in reference.quantize_tokens(input, activations))
    rest = (*(t.to(DEVICE) for t in (codes, exponent, bias)), bits, variant, dtype)
    for laid_out in (values, values.transpose(0, 2).contiguous().transpose(0, 2)):
        out = triton.rounded_linear(laid_out, scale, *rest).cpu()
        assert out.dtype == dtype
        assert torch.equal(out, expected)
    assert triton.rounded_linear(values[:, :0], scale[:, :0], *rest).shape == (2, 0, 48)


@pytest.mark.parametrize("activations", ["float", "int8", "float8"])
def test_a_bad_token_spoils_no_other(activations):
    input = numbers(5, 64, dtype=torch.float16)
    input[1, 5], input[3, 6] = float("nan"), float("inf")
    out = run(input, *layer(64, 20), activations=activations)
    assert out[[0, 2, 4]].isfinite().all()
    assert out[1].isnan().all()
    assert not out[3].isfinite().any() or activations == "float"


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("bits", [4, 5])
def test_any_strides(bits, activations):
    """Tokens with gaps of NaN, transposed inputs, codes, exponents and biases cut out of larger tensors."""
    codes, exponent = layer(40, 24, bits)
    bias = numbers(24, seed=2, dtype=torch.float32)
    base = numbers(3, 7, 40, dtype=torch.float32)
    expected = run(base, codes, exponent, bias, bits, activations=activations)
    spread = torch.full((3, 9, 50), torch.nan)
    spread[:, 1:8, 5:45] = base
    inputs = [spread.to(DEVICE)[:, 1:8, 5:45], base.transpose(0, 2).contiguous().transpose(0, 2)]
    wide_codes, wide_rest = torch.full((24, 99), 255, dtype=torch.uint8), torch.full((24, 3), 99, dtype=torch.int8)
    wide_codes[:, 1 : 1 + codes.shape[1]], wide_rest[:, 1] = codes, exponent
    for input in inputs:
        cut = wide_codes.to(DEVICE)[:, 1 : 1 + codes.shape[1]]
        scattered_codes = codes.t().contiguous().to(DEVICE).t()
        for laid_out in (cut, scattered_codes):
            out = triton.linear(
                input.to(DEVICE), laid_out, wide_rest.to(DEVICE)[:, 1], bias[:, None].expand(24, 2).to(DEVICE)[:, 1],
                bits, "ps", activations,
            )  # fmt: skip
            assert torch.equal(out.cpu(), expected)


def test_offsets_beyond_32_bits():
    """Tokens that lie 2^30 numbers apart, in memory of which nothing else is touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    spread = storage.as_strided((3, 64), (2**30, 1))
    input = numbers(3, 64, dtype=torch.float16)
    spread.copy_(input)
    codes, exponent = (t.to(DEVICE) for t in layer(64, 20))
    for activations in ("float", "int8"):
        far = triton.linear(spread, codes, exponent, None, 4, "ps", activations).cpu()
        assert torch.equal(far, run(input, codes, exponent, activations=activations))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_many_tokens_have_the_bits_of_linear(monkeypatch, dtype):
    if dtype != torch.float64:
        monkeypatch.setattr(triton, "MOST_TOKENS", 16)
    input, bias = numbers(17, 75, dtype=dtype).to(DEVICE), numbers(20, dtype=dtype).to(DEVICE)
    codes, exponent = (t.to(DEVICE) for t in layer(75, 20))
    weight = reference.decoded(codes, exponent, 75, 4, "ps", dtype)
    assert torch.equal(triton.linear(input, codes, exponent, bias, 4, "ps", "float"), F.linear(input, weight, bias))


@pytest.mark.parametrize("activations", ["float", "int8", "float8"])
@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (3, 0), (2, 2, 2, 7)], ids=str)
def test_shapes(shape, activations):
    width = shape[-1]
    codes = pack_codes(torch.zeros(5, width, dtype=torch.uint8) + 7)
    out = run(torch.ones(shape), codes, torch.zeros(5, dtype=torch.int8), torch.ones(5), activations=activations)
    assert out.shape == (*shape[:-1], 5)
    torch.testing.assert_close(out, torch.full_like(out, width + 1.0))
