"""The definition of the shift format (rounding to sign and power of two, decoding, exactly) and of its layer.

A code of b bits is a sign (bit b - 1) and a magnitude m of b - 1 bits; E is an int8 exponent per output channel, and
top = 2^(b-1) - 1. Its value is s 2^(E - top + m); in variant "ps" m = 0 means 0. After DeepShift (docs/papers.md).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.ops.autocast import without_autocast
from vitrify.ops.shift import packing
from vitrify.ops.tracing import exporting

VARIANTS = ("ps", "q")
ACTIVATIONS = ("float", "int8", "float8")
# The largest magnitude that each format of quantised activations holds: symmetric int8, and E4M3.
LARGEST = {"int8": 127, "float8": 448}

# log2|w| rounds up where the mantissa in [0.5, 1) exceeds sqrt(1/2). No float equals that irrational number, so there
# are no ties; the float64 just below it is also the right bound once it is rounded to float32.
LOG_HALF_WAY = math.nextafter(math.sqrt(0.5), 0)
# Rounding to the nearer of two powers, 2^k and 2^(k+1), turns at 1.5 2^k; a tie goes up.
LINEAR_HALF_WAY = math.nextafter(0.75, 0)


def top_level(bits: int) -> int:
    """Return the largest magnitude code, which stands for 2^E; it is also the number of exponents of variant "ps"."""
    return (1 << (bits - 1)) - 1


def lowest_level(variant: str) -> int:
    """Return the smallest magnitude code that stands for a power of two."""
    return 1 if variant == "ps" else 0


def power_limits(dtype: torch.dtype) -> tuple[int, int]:
    """Return the exponents of the smallest and the largest power of two that `dtype` may be asked to hold.

    float16's subnormals count, which every device computes with. Those of the wider types do not (some devices flush
    them), and float64 gets float32's range, so that E fits in int8.
    """
    return (-24, 15) if dtype == torch.float16 else (-126, 127)


def exponent_limits(dtype: torch.dtype, bits: int, variant: str) -> tuple[int, int]:
    """Return the least and the largest E whose levels, all of them, are powers of two that `dtype` holds."""
    least, largest = power_limits(dtype)
    return least + top_level(bits) - lowest_level(variant), largest


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` (out,) shaped to broadcast over `like` (out, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


def wide(weight: Tensor) -> Tensor:
    """Return `weight` in the dtype it is rounded in: float64 as it is, all others in float32."""
    return weight if weight.dtype == torch.float64 else weight.float()


def nearest_power(x: Tensor, half_way: float = LOG_HALF_WAY) -> Tensor:
    """Return int32 round(log2|x|) of float32 or float64 `x`; far below every exponent where x = 0."""
    mantissa, exponent = torch.frexp(x.abs())
    return (exponent - 1 + (mantissa > half_way)).masked_fill(x == 0, -(2**15))


def default_exponent(weight: Tensor, bits: int, variant: str) -> Tensor:
    """Return int32 (out,): round(log2 max|row|), held where the dtype of `weight` has every level. Zero rows: least."""
    largest = wide(weight).abs().flatten(1).amax(1)
    return nearest_power(largest).clamp(*exponent_limits(weight.dtype, bits, variant))


def round_levels(weight: Tensor, exponent: Tensor, bits: int, variant: str) -> Tensor:
    """Return the magnitude codes, int32: round(log2|w|) clamped to the channel's range; "ps" has 0 below half a level.

    Half a level is meant in log2: what would round to a power below the lowest one becomes 0.
    """
    top, lowest = top_level(bits), lowest_level(variant)
    level = nearest_power(wide(weight)) - per_channel(exponent, weight) + top
    clamped = level.clamp(lowest, top)
    return clamped.masked_fill(level < lowest, 0) if variant == "ps" else clamped


def decode_levels(level: Tensor, negative: Tensor, exponent: Tensor, bits: int, variant: str) -> Tensor:
    """Return float32 s 2^(E - top + m), exactly, from int32 magnitudes, their bool signs and E (out,)."""
    value = power_of_two(level + (per_channel(exponent.int(), level) - top_level(bits)))
    value = torch.where(negative, -value, value)
    return value.masked_fill(level == 0, 0) if variant == "ps" else value


def decode(codes: Tensor, exponent: Tensor, bits: int, variant: str) -> Tensor:
    """Return the float32 weights of unpacked codes (out, ...) and exponents (out,), of any integer dtypes."""
    codes = codes.int()
    level = codes & top_level(bits)
    return decode_levels(level, codes > top_level(bits), exponent, bits, variant)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return float32 2^exponent for int32 exponents in [-126, 127]: not a rounded pow, the float's own bits."""
    if exporting():
        # Neither ONNX nor TorchScript can reinterpret bits; there the powers are a table.
        table = torch.tensor([2.0**p for p in range(-126, 128)], device=exponent.device)
        return table[(exponent + 126).clamp(min=0).long()]
    return ((exponent + 127) << 23).view(torch.float32)


def decoded(codes: Tensor, exponent: Tensor, width: int, bits: int, variant: str, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, width) of packed codes in `dtype`."""
    # int32 before the bits are taken apart: torch's ONNX export gives uint8 and a number different types.
    return decode(packing.unpack(codes.int(), width, bits), exponent, bits, variant).to(dtype)


def quantize_tokens(input: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Return (values, scale): values (..., in) as int8 or E4M3, scale (..., 1) float32, of float (..., in).

    kind: "int8", values = round(input / scale), half to even, scale = max|token| / 127; or "float8", values = input /
    scale rounded to E4M3, scale = max|token| / 448. float64 keeps a float64 scale. Tokens whose scale would not be a
    normal number (all zeros, or in float32 below 1.5e-36 for int8 and 5.3e-36 for float8) become zeros of scale 1; a
    NaN or an inf makes its token's scale one too.
    """
    input = wide(input)
    if input.shape[-1] == 0:  # which has no maximum
        empty = input.to(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
        return empty, input.new_ones(*input.shape[:-1], 1)
    # Without abs(), whose result would be written to memory and read again.
    largest = torch.maximum(input.amax(-1, keepdim=True), -input.amin(-1, keepdim=True))
    scale = largest / LARGEST[kind]
    scale = scale.masked_fill(scale < torch.finfo(scale.dtype).tiny, 1)
    values = input / scale
    return (values.round_().to(torch.int8) if kind == "int8" else values.to(torch.float8_e4m3fn)), scale


def linear(
    input: Tensor,
    codes: Tensor,
    exponent: Tensor,
    bias: Tensor | None,
    bits: int,
    variant: str,
    activations: str,
) -> Tensor:
    """Return the layer's output by plain PyTorch, in the input's dtype; `codes` are packed.

    "float": F.linear on the decoded weight. "int8": the exact sum of integers times powers of two, rounded to float32
    once, times the token's scale, plus the bias. "float8": the same on E4M3 values, with sums in float32.
    """
    if activations == "float":
        return F.linear(input, decoded(codes, exponent, input.shape[-1], bits, variant, input.dtype), bias)
    values, scale = quantize_tokens(input, activations)
    return rounded_linear(values, scale, codes, exponent, bias, bits, variant, input.dtype)


def rounded_linear(
    values: Tensor,
    scale: Tensor,
    codes: Tensor,
    exponent: Tensor,
    bias: Tensor | None,
    bits: int,
    variant: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return the layer's output in `dtype` for tokens that `quantize_tokens` has rounded."""
    weight = decoded(codes, exponent, values.shape[-1], bits, variant, weight_dtype(values, scale))
    return rounded_linear_by(values, scale, weight, bias, dtype)


def weight_dtype(values: Tensor, scale: Tensor) -> torch.dtype:
    """Return the dtype that rounded tokens are multiplied in."""
    # In units of a channel's least power int8 sums stay below 127 2^30 in: float64 holds them exactly to in = 2^16.
    return torch.float64 if values.dtype == torch.int8 else scale.dtype


def rounded_linear_by(values: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `rounded_linear` by a decoded weight (out, in) in the tokens' `weight_dtype`."""
    with without_autocast(values):
        sums = F.linear(values.to(weight.dtype), weight)
    out = sums.to(scale.dtype) * scale
    return (out if bias is None else out + bias).to(dtype)
