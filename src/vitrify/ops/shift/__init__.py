"""Shift layers: weights that are a sign and a power of two (DeepShift, ShiftAddViT). The maths is in README.md.

>>> import torch
>>> from vitrify.ops import pack_codes, shift_linear, shift_quantize
>>> codes, exponent = shift_quantize(torch.tensor([[0.9, -0.3, 0.0]]), bits=4)
>>> shift_linear(torch.ones(1, 3), pack_codes(codes, bits=4), exponent)  # 1 - 1/4 + 0
tensor([[0.7500]])
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.errors import InputError
from vitrify.ops import gpu
from vitrify.ops.autocast import under_autocast
from vitrify.ops.shift import cpu, packing, reference, validation
from vitrify.ops.shift.registration import shift_integer_sums_op, shift_linear_op, shift_linear_rounded_op
from vitrify.ops.shift.ste import QuantizedTokens, StraightThrough
from vitrify.ops.tracing import exporting, fx_leaf


def shift_quantize(
    weight: Tensor, bits: int = 4, variant: str = "ps", exponent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round each weight to a sign and a power of two: round(log2|w|), clamped to the channel's range.

    weight: float (out, in, ...). Returns (codes, exponent): codes uint8, the weight's shape, one `bits`-bit code per
    byte; exponent int8 (out,), of the channel's largest level 2^E.
    variant "ps": 0, and 2^(bits-1) - 1 powers up to 2^E; what lies below half a level (in log2) becomes 0.
    variant "q": 2^(bits-1) powers and no zero; small weights, and 0 itself (positive), get the lowest power.
    `exponent`: int (out,); by default round(log2 max|row|), as far as the weight's dtype holds every level. Rounding
    decoded weights again gives the same codes. There are no ties: 2^(k+1/2) is irrational.

    Raises InputError for NaN or inf, for bits outside 3..6, an unknown variant, or exponents out of range.
    DeepShift, through ShiftAddViT; docs/papers.md.
    """
    validation.check_format(bits, variant)
    validation.check_weight(weight)
    weight = weight.detach()
    if exponent is None:
        exponent = reference.default_exponent(weight, bits, variant)
    validation.check_exponent(exponent, weight.shape[0], bits, variant)
    level = reference.round_levels(weight, exponent.int(), bits, variant).to(torch.uint8)
    # No code for -0: each value has one code.
    negative = (weight < 0) & (level >= reference.lowest_level(variant))
    return level | (negative.to(torch.uint8) << (bits - 1)), exponent.to(torch.int8)


def shift_decode(
    codes: Tensor,
    exponent: Tensor,
    bits: int = 4,
    variant: str = "ps",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the weights that unpacked codes stand for, exactly, in `dtype`.

    codes: uint8 (out, in, ...), one code per byte; exponent: int8 (out,). The result has the shape of `codes`.
    Raises InputError for codes or exponents out of range, and if `dtype` is float16 and a power that the codes use
    overflows or becomes 0 there.
    """
    validation.check_format(bits, variant)
    validation.check_codes(codes, bits)
    validation.check_exponent(exponent, codes.shape[0], bits, variant)
    validation.check_representable(codes, exponent, bits, variant, dtype)
    return reference.decode(codes, exponent, bits, variant).to(dtype)


def pack_codes(codes: Tensor, bits: int = 4) -> Tensor:
    """Pack codes uint8 (out, in, ...) into bytes uint8 (out, bytes), the input axes flattened.

    3 and 4 bits: two codes per byte, the even input in the low half, an odd width padded with a 0. 5 and 6 bits: one
    code per byte. Raises InputError if the codes are not uint8 or do not fit in `bits`.
    """
    validation.check_format(bits, "ps")
    validation.check_codes(codes, bits)
    return packing.pack(codes, bits)


def unpack_codes(packed: Tensor, in_features: int, bits: int = 4) -> Tensor:
    """Return the codes uint8 (out, in_features) from `pack_codes`'s bytes; InputError if their shape does not fit."""
    validation.check_format(bits, "ps")
    validation.check_packed(packed, in_features, bits)
    return packing.unpack(packed, in_features, bits)


@fx_leaf
def shift_linear(
    input: Tensor,
    codes: Tensor,
    exponent: Tensor,
    bias: Tensor | None = None,
    *,
    bits: int = 4,
    variant: str = "ps",
    activations: str = "float",
) -> Tensor:
    """F.linear(input, decode(codes), bias) with a weight of `bits` bits in memory.

    input (..., in), float16 | bfloat16 | float32 | float64 -> (..., out) in the same dtype; codes: uint8 (out, bytes),
    *packed* as `pack_codes` returns them; exponent: int8 (out,); bias (out,) in the input's dtype. Under autocast the
    input and the bias are cast as F.linear's are. The input and the bias get gradients.
    float16 ends at 2^15 and starts at 2^-24: `shift_decode` checks that codes fit, this function reads no values.

    activations "float": the bits of F.linear. "int8" and "float8" round each token first, on a scale of its own
    (symmetric int8, or E4M3): "int8" sums integers exactly, "float8" in float32. Their gradient is that of "float".
    Compiled without gradients, the rounding is fused into the norm or the activation in front; README.md has the bits.

    Raises InputError (shapes, dtypes, devices, bits, variant, activations).
    """
    if isinstance(input, Tensor) and under_autocast(input):
        dtype = _dtype_in_linear(input)
        input = input.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    validation.check_format(bits, variant)
    validation.check_activations(activations)
    validation.check_linear(input, codes, exponent, bias, bits, variant)
    if exporting():
        return reference.linear(input, codes, exponent, bias, bits, variant, activations)
    if activations != "float" and _rounds_in_the_graph(input, bias, bits, activations):
        values, scale = _rounded_in_the_graph(input, activations)
        if input.device.type == "cpu" and activations == "int8" and cpu.always_integers(bits, variant, input.shape[-1]):
            # What scales the sums is fused into whatever follows.
            return cpu.scaled(*shift_integer_sums_op(values, codes, exponent, bits, variant), scale, bias, input.dtype)
        return shift_linear_rounded_op(values, scale, codes, exponent, bias, bits, variant, input.dtype)
    return shift_linear_op(input, codes, exponent, bias, bits, variant, activations)


@fx_leaf
def shift_ste(weight: Tensor, bits: int = 4, variant: str = "ps") -> Tensor:
    """Return decode(quantise(weight)) in the weight's dtype, with the identity as gradient (straight-through).

    weight: float (out, in, ...), the one latent weight. Rounded in float32 (float64 for float64) whatever autocast
    says, so nothing overflows; NaN and inf become NaN. Exponents are `shift_quantize`'s default, anew at each call.
    Raises InputError for bits outside 3..6, an unknown variant, or a weight that is not float (out, in, ...).
    """
    validation.check_format(bits, variant)
    if weight.dtype not in validation.DTYPES or weight.dim() < 2:
        raise InputError(f"weight must be float (out, in, ...), not {weight.dtype} of shape {tuple(weight.shape)}")
    out: Tensor = StraightThrough.apply(weight, bits, variant)
    return out


@fx_leaf
def quantize_tokens_ste(input: Tensor, activations: str) -> Tensor:
    """Return a layer's input (..., in) as "int8" or "float8" `activations` round it, with the identity as gradient.

    In the input's dtype, or autocast's; "float" returns the input itself. For training: F.linear on it and on
    `shift_ste`'s weight is `shift_linear` up to the rounding of floats. Raises InputError for unknown activations.
    """
    validation.check_activations(activations)
    if activations == "float":
        return input
    out: Tensor = QuantizedTokens.apply(input.to(_dtype_in_linear(input)), activations)
    return out


def _rounds_in_the_graph(input: Tensor, bias: Tensor | None, bits: int, activations: str) -> bool:
    """Say whether plain calls, which torch.compile fuses into what precedes them, are to round the tokens.

    Not where gradients are wanted, which are those of the unrounded input; nor float64.
    """
    if not torch.compiler.is_compiling() or input.dtype == torch.float64:
        return False
    if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    if input.device.type == "cpu":
        return True
    # Weights of 6 bits meet E4M3 values in bfloat16, as the kernel that rounds them writes them.
    return gpu.available(input.device) and (activations == "int8" or (bits < 6 and gpu.converts_e4m3(input.device)))


def _rounded_in_the_graph(input: Tensor, activations: str) -> tuple[Tensor, Tensor]:
    """Return `reference.quantize_tokens` in calls that suit a compiler."""
    if input.device.type == "cpu":
        # Its loops would compute a GELU twice, for the scales and for the values: strides make them keep it.
        input = input.as_strided(input.shape, input.stride())
    values, scale = reference.quantize_tokens(input, activations)
    # The values of a token with an infinity hold NaN, of which a compiler may make any int8.
    return values, scale.masked_fill(scale.isinf(), float("nan"))


def _dtype_in_linear(input: Tensor) -> torch.dtype:
    """Return the dtype that F.linear would compute in: autocast's where that is on, which leaves float64 alone."""
    if under_autocast(input) and input.dtype != torch.float64:
        return torch.get_autocast_dtype(input.device.type)
    return input.dtype
