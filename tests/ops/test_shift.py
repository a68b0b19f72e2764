"""Rounding, decoding, packing and shift_linear against statements in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrify.errors import InputError
from vitrify.ops import pack_codes, shift_decode, shift_linear, shift_quantize, shift_ste, unpack_codes

FORMATS = [(bits, variant) for bits in (3, 4, 5, 6) for variant in ("ps", "q")]
formats = pytest.mark.parametrize(("bits", "variant"), FORMATS)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return normal weights whose rows differ in size by up to 2^8."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(-6, 3, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1 * 2.0**row).to(dtype)


def value_of(code: int, exponent: int, bits: int, variant: str) -> Fraction:
    """Return what a code stands for, exactly."""
    sign, magnitude = divmod(code, 2 ** (bits - 1))
    if variant == "ps" and magnitude == 0:
        return Fraction(0)
    return (-1) ** sign * Fraction(2) ** (exponent - (2 ** (bits - 1) - 1) + magnitude)


def rounded_log2(x: float) -> int:
    """Return round(log2 x) exactly: the k with 2^(2k - 1) <= x^2 < 2^(2k + 1)."""
    square = Fraction(x) ** 2
    k = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    while square < Fraction(2) ** (2 * k - 1):
        k -= 1
    while square >= Fraction(2) ** (2 * k + 1):
        k += 1
    return k


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decode_is_exact_for_every_code(bits, variant, dtype):
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(3, 1)
    # The edges of what the dtype holds, and the middle.
    low, high = (-24, 15) if dtype == torch.float16 else (-126, 127)
    exponent = torch.tensor([low + 2 ** (bits - 1) - (2 if variant == "ps" else 1), 0 if bits < 6 else 7, high])
    decoded = shift_decode(codes, exponent, bits, variant, dtype)
    assert decoded.dtype == dtype
    for row, e in zip(decoded.tolist(), exponent.tolist(), strict=True):
        assert [Fraction(v) for v in row] == [value_of(c, e, bits, variant) for c in range(2**bits)]


def test_rounding_of_every_positive_float16():
    """All 31,743 of them in one row of 6 bits, against exact arithmetic."""
    halves = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    expected = torch.tensor([2.0 ** min(rounded_log2(half), 4) for half in halves.tolist()])
    for variant in ("ps", "q"):
        codes, exponent = shift_quantize(halves[None].float(), 6, variant, exponent=torch.tensor([4]))
        assert torch.equal(shift_decode(codes, exponent, 6, variant)[0], expected)
        assert exponent.tolist() == [4]


@settings(max_examples=50, deadline=None)
@given(st.floats(0.5, 2.0), st.integers(-60, 60))
def test_float64_and_float32_round_where_exact_arithmetic_does(mantissa, power):
    for dtype in (torch.float64, torch.float32):
        weight = torch.tensor([[mantissa * 2.0**power]], dtype=dtype)
        _, exponent = shift_quantize(weight)
        assert exponent.item() == rounded_log2(weight.item())


def test_the_floats_beside_the_half_way_point():
    for dtype in (torch.float32, torch.float64):
        middle = torch.tensor(2.0, dtype=torch.float64).sqrt().to(dtype)
        step = torch.stack([torch.nextafter(middle, middle * 0), middle, torch.nextafter(middle, middle * 2)])
        _, exponent = shift_quantize(step[:, None])
        assert exponent.tolist() == [rounded_log2(v) for v in step.tolist()]
        assert exponent.tolist() != [exponent[0].item()] * 3  # the half-way point is among them


@formats
def test_small_weights_become_zero_or_the_lowest_power(bits, variant):
    top = 2 ** (bits - 1) - 1
    lowest = 2.0 ** (-top + (variant == "ps"))
    weight = torch.tensor([[1.0, lowest * 0.708, -lowest * 0.708, lowest * 0.707, -lowest * 0.707, 0.0, -0.0]])
    decoded = shift_decode(*shift_quantize(weight, bits, variant), bits, variant)[0].tolist()
    below = [0, 0] if variant == "ps" else [lowest, -lowest]
    assert decoded[:5] == [1.0, lowest, -lowest, *below]
    assert decoded[5:] == ([0, 0] if variant == "ps" else [lowest, lowest])


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounding_twice_gives_the_same_codes(bits, variant, dtype):
    weight = weights(6, 50, dtype=dtype)
    weight[3] = 0
    codes, exponent = shift_quantize(weight, bits, variant)
    assert codes.shape == weight.shape
    assert (codes.dtype, exponent.dtype) == (torch.uint8, torch.int8)
    decoded = shift_decode(codes, exponent, bits, variant, dtype)
    again = shift_quantize(decoded, bits, variant)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], exponent)
    assert (decoded[3].abs() <= (0 if variant == "ps" else 2.0**-24)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(FORMATS), st.integers(1, 9), st.integers(1, 9))
def test_rounding_is_off_by_at_most_half_a_level(seed, fmt, out, width):
    bits, variant = fmt
    weight = weights(out, width, seed=seed)
    codes, exponent = shift_quantize(weight, bits, variant)
    decoded = shift_decode(codes, exponent, bits, variant, torch.float64)
    lowest = (2.0 ** (exponent.double() - 2 ** (bits - 1) + 1 + (variant == "ps")))[:, None].expand_as(weight)
    small = weight.abs() < lowest * 0.7071
    ratio = (weight / decoded)[~small]
    assert ((ratio > 0.7071) & (ratio < 1.4143)).all()
    assert torch.equal(decoded[small].abs(), lowest[small] * (variant == "q"))


def test_a_weight_has_one_code_whatever_its_dtype():
    weight = weights(4, 64, dtype=torch.bfloat16)
    expected = shift_quantize(weight)
    for dtype in (torch.float32, torch.float64):
        actual = shift_quantize(weight.to(dtype))
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_packing_round_trip_and_size(bits, width):
    codes = torch.randint(2**bits, (5, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, (width + 1) // 2 if bits <= 4 else width)
    assert torch.equal(unpack_codes(packed, width, bits), codes)
    if bits == 4 and width > 1:
        assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]


def test_packing_flattens_a_convolution():
    codes = torch.randint(16, (4, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_codes(pack_codes(codes), 75).reshape(codes.shape), codes)


@formats
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 0, 7), (2, 3, 5, 7)], ids=str)
def test_shift_linear_is_linear_with_the_decoded_weight(bits, variant, shape):
    generator = torch.Generator().manual_seed(1)
    codes, exponent = shift_quantize(weights(6, 7), bits, variant)
    weight = shift_decode(codes, exponent, bits, variant, torch.float64)
    bias = torch.randn(6, dtype=torch.float64, generator=generator)
    packed = pack_codes(codes, bits)
    for b in (bias, None):
        input = torch.randn(shape, dtype=torch.float64, generator=generator)
        expected = F.linear(input, weight, b)
        assert torch.equal(shift_linear(input, packed, exponent, b, bits=bits, variant=variant), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_shift_linear_in_lower_precision(dtype):
    codes, exponent = shift_quantize(weights(6, 8))
    weight = shift_decode(codes, exponent, dtype=dtype)
    input = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(shift_linear(input, pack_codes(codes), exponent), F.linear(input, weight))


def test_gradients():
    generator = torch.Generator().manual_seed(2)
    codes, exponent = shift_quantize(weights(2, 3))
    packed = pack_codes(codes)
    for shape in ((3,), (2, 2, 3)):
        input = torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        bias = torch.randn(2, dtype=torch.float64, generator=generator, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, b: shift_linear(x, packed, exponent, b), (input, bias))
        assert torch.autograd.gradgradcheck(lambda x, b: shift_linear(x, packed, exponent, b).tanh(), (input, bias))


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_straight_through(bits, variant, dtype):
    weight = weights(6, 3, 5, 5, dtype=dtype).requires_grad_()
    out = shift_ste(weight, bits, variant)
    assert torch.equal(out, shift_decode(*shift_quantize(weight, bits, variant), bits, variant, dtype))
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (actual,) = torch.autograd.grad(out, weight, grad)
    assert torch.equal(actual, grad)


def test_straight_through_stays_finite_in_float16_and_under_autocast():
    weight = torch.tensor([[65504.0, 1.0], [6e-8, 0.0], [6e-5, 1e-7]], dtype=torch.float16)
    assert shift_ste(weight, 6).tolist() == [[32768.0, 1.0], [2.0**-24, 0.0], [2.0**-14, 2.0**-23]]
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(shift_ste(weight.float(), 6)[1:], shift_ste(weight, 6)[1:].float())


def test_straight_through_shows_a_diverged_weight():
    out = shift_ste(torch.tensor([[1.0, float("nan")], [float("inf"), 2.0], [1.0, -2.0]]))
    assert out.isnan().tolist() == [[False, True], [True, False], [False, False]]
    assert out[2].tolist() == [1.0, -2.0]


CODES, EXPONENT = shift_quantize(weights(6, 7))
PACKED = pack_codes(CODES)
X = torch.ones(2, 7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shift_quantize(X, 2), "bits must be an integer from 3 to 6 .* not 2"),
        (lambda: shift_quantize(X, True), "bits must be an integer from 3 to 6 .* not True"),
        (lambda: shift_quantize(X, 4, "psq"), "unknown shift variant 'psq': did you mean 'ps'"),
        (lambda: shift_quantize(X * float("nan")), "weight holds NaN"),
        (lambda: shift_quantize(X * float("inf")), "weight holds inf"),
        (lambda: shift_quantize(X.double() * 1e300), r"weight holds 1e\+300, beyond the largest power of two"),
        (lambda: shift_quantize(X.int()), "weight must be float16, .* not int32"),
        (lambda: shift_quantize(X[0]), r"shape \(out, in, ...\) .* not \(7,\)"),
        (lambda: shift_quantize(X, exponent=torch.zeros(3, dtype=torch.int8)), r"shape \(3,\): .* \(2,\)"),
        (lambda: shift_quantize(X, exponent=torch.tensor([0, -125])), "runs from -125 to 0: .* within -120 to 127"),
        (lambda: shift_quantize(X, exponent=torch.zeros(2)), "exponent must be an int8 Tensor, not float32"),
        (lambda: shift_decode(CODES.int(), EXPONENT), "codes must be a uint8 Tensor, .* not int32"),
        (lambda: shift_decode(CODES, EXPONENT, bits=3), "3-bit codes run from 0 to 7"),
        (lambda: shift_decode(CODES, EXPONENT, dtype=torch.int8), "dtype must be float16, .* not int8"),
        (lambda: pack_codes(CODES[0]), r"codes must have shape \(out, in, ...\), not \(7,\)"),
        (lambda: unpack_codes(PACKED, 9), "9 inputs of 4 bits are packed into 5 bytes"),
        (lambda: shift_linear(X, CODES, EXPONENT), "7 inputs .* 4 bytes .*: these look unpacked, call pack_codes"),
        (lambda: shift_linear(X, PACKED, EXPONENT, bits=5), r"shape \(6, 4\), but 7 inputs of 5 bits .* 7 bytes"),
        (lambda: shift_linear(X, PACKED, EXPONENT[:5]), r"exponent has shape \(5,\): .* shape \(6,\)"),
        (lambda: shift_linear(X, PACKED, EXPONENT, torch.ones(7)), r"bias has shape \(7,\), but .* 6 output channels"),
        (lambda: shift_linear(X, PACKED, EXPONENT, torch.ones(6).half()), "bias is float16 but input is float32"),
        (lambda: shift_linear(X.int(), PACKED, EXPONENT), "input must be a float16, .* Tensor, not int32"),
        (lambda: shift_linear(X.to("meta"), PACKED, EXPONENT), "codes is on cpu but input is on meta"),
        (lambda: shift_ste(X.long()), "weight must be float"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_float16_refuses_what_it_cannot_hold():
    codes, exponent = shift_quantize(torch.tensor([[70000.0, 1.0]]))
    with pytest.raises(InputError, match=r"2\^16 overflows float16, which ends at 2\^15: keep this layer in bfloat16"):
        shift_decode(codes, exponent, dtype=torch.float16)
    assert shift_decode(codes, exponent, dtype=torch.bfloat16)[0, 0] == 2**16
    weight = torch.tensor([[1.0, 2.0**-25]])
    codes, exponent = shift_quantize(weight, 6)
    with pytest.raises(InputError, match=r"2\^-25 would become 0 in float16, .* use fewer than 6 bits"):
        shift_decode(codes, exponent, 6, dtype=torch.float16)
    codes, exponent = shift_quantize(weight, 5)
    assert shift_decode(codes, exponent, 5, dtype=torch.float16).tolist() == [[1.0, 0.0]]
