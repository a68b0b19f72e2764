"""Shift layers on a CPU: the weight is decoded once, and integers go through torch's integer product.

`torch._int_mm` (oneDNN) was the fastest of torch's integer products where this was written, ahead of FBGEMM's and of
oneDNN's prepacked linear, and returns the int32 sums themselves. It is exact with or without VNNI: lacking that, oneDNN
adds pairs u8 x s8 in saturating 16 bits, and 2 x 255 x 64 stays below 2^15. Seven powers of two end at 64.
torch 2.11's product is wrong for a width of 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.ops.shift import cache, reference

LARGEST_INTEGER = 64
# int32 holds the sum of this many products of 127 and 64.
WIDEST = 2**18


def linear(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    """Return `reference.linear`, with the weight from the cache; int8 gives the same bits faster, if 7 levels do."""
    if activations == "float":
        return F.linear(input, weight(codes, exponent, input.shape[-1], bits, variant, input.dtype), bias)
    values, scale = reference.quantize_tokens(input, activations)
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
    """Return `reference.rounded_linear`, the same way."""
    width = values.shape[-1]
    if values.dtype == torch.int8 and 1 < width <= WIDEST:
        integers = _integers(codes, exponent, width, bits, variant)
        if integers is not None:
            return scaled(_sums(values, integers[0]), integers[1], scale, bias, dtype)
    decoded = weight(codes, exponent, width, bits, variant, reference.weight_dtype(values, scale))
    return reference.rounded_linear_by(values, scale, decoded, bias, dtype)


def weight(codes: Tensor, exponent: Tensor, width: int, bits: int, variant: str, dtype: torch.dtype) -> Tensor:
    """Return `reference.decoded` from the cache: it is shared, do not write to it."""
    return cache.recall(
        codes,
        exponent,
        (bits, variant, width, dtype),
        lambda: reference.decoded(codes, exponent, width, bits, variant, dtype),
    )


def as_integers(codes: Tensor, exponent: Tensor, width: int, bits: int, variant: str) -> tuple[Tensor, Tensor] | None:
    """Return (integers int8 (in, out), unit float32 (out,)) whose product is the decoded weight, transposed.

    The unit is a channel's least power of two. None where a channel's powers are more than 2^6 apart.
    """
    decoded = reference.decoded(codes, exponent, width, bits, variant, torch.float32)
    unit = decoded.abs().masked_fill_(decoded == 0, float("inf")).amin(1)
    unit.masked_fill_(unit.isinf(), 1)
    integers = decoded.div_(unit[:, None])
    if bool((integers.abs() > LARGEST_INTEGER).any()):
        return None
    return integers.to(torch.int8).t(), unit


def always_integers(bits: int, variant: str, width: int) -> bool:
    """Say whether `integer_sums` takes all codes of a format, whatever powers they use."""
    return 1 < width <= WIDEST and reference.top_level(bits) - reference.lowest_level(variant) < 7


def integer_sums(values: Tensor, codes: Tensor, exponent: Tensor, bits: int, variant: str) -> tuple[Tensor, Tensor]:
    """Return the sums int32 (..., out) of int8 values (..., in) times integer weights, and their unit float32 (out,).

    For formats with `always_integers`.
    """
    integers = _integers(codes, exponent, values.shape[-1], bits, variant)
    assert integers is not None
    # A copy: whoever compiles a graph with this in it may write to what it returns.
    return _sums(values, integers[0]), integers[1].clone()


def scaled(sums: Tensor, unit: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the layer's output from `integer_sums` and the tokens' scale (..., 1)."""
    out = sums.to(scale.dtype).mul_(unit).mul_(scale)
    return (out if bias is None else out.add_(bias)).to(dtype)


def _integers(codes: Tensor, exponent: Tensor, width: int, bits: int, variant: str) -> tuple[Tensor, Tensor] | None:
    return cache.recall(
        codes, exponent, (bits, variant, width), lambda: as_integers(codes, exponent, width, bits, variant)
    )


def _sums(values: Tensor, integers: Tensor) -> Tensor:
    rows = values.reshape(-1, values.shape[-1])
    return torch._int_mm(rows, integers).view(*values.shape[:-1], integers.shape[1])
