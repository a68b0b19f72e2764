"""Every argument check of the shift ops, in one place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vitrify.errors import InputError, unknown
from vitrify.ops.shift.packing import codes_per_byte, packed_width
from vitrify.ops.shift.reference import (
    ACTIVATIONS,
    VARIANTS,
    exponent_limits,
    lowest_level,
    per_channel,
    power_limits,
    top_level,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_format(bits: int, variant: str) -> None:
    """Raise InputError unless `bits` is an integer from 3 to 6 and `variant` a known one."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 3 <= bits <= 6:
        raise InputError(f"bits must be an integer from 3 to 6 (a sign and 2 to 5 bits of exponent), not {bits!r}")
    if variant not in VARIANTS:
        raise unknown("shift variant", str(variant), VARIANTS)


def check_activations(activations: str) -> None:
    """Raise InputError unless `activations` is a known format of a layer's input."""
    if activations not in ACTIVATIONS:
        raise unknown("activations", str(activations), ACTIVATIONS)


def has_values(tensor: Tensor) -> bool:
    """Say whether values can be read: meta and fake tensors have a shape only."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def check_weight(weight: Tensor) -> None:
    """Raise InputError unless `weight` (out, ...) is a float tensor of finite values that powers of two can reach."""
    if not isinstance(weight, Tensor):
        raise InputError(f"weight must be a Tensor, not {type(weight).__name__}")
    if weight.dtype not in DTYPES:
        raise InputError(f"weight must be float16, bfloat16, float32 or float64, not {_dtype(weight.dtype)}")
    if weight.dim() < 2 or weight.numel() == 0:
        raise InputError(f"weight must have shape (out, in, ...) and at least one entry, not {_shape(weight)}")
    if not has_values(weight):
        return
    largest = weight.detach().abs().max().item()
    if not largest < float("inf"):  # also NaN, which is never below
        kind = "inf" if largest == float("inf") else "NaN"
        raise InputError(f"weight holds {kind}: a shift layer can only be made from finite weights")
    if largest >= 2.0**127.5:
        raise InputError(f"weight holds {largest:.3g}, beyond the largest power of two, 2^127: scale it down")


def check_exponent(exponent: Tensor, channels: int, bits: int, variant: str, *, values: bool = True) -> None:
    """Raise InputError unless `exponent` is an integer tensor (channels,) and, if `values`, in the format's range."""
    if not isinstance(exponent, Tensor) or exponent.dtype not in (torch.int8, torch.int16, torch.int32, torch.int64):
        got = _dtype(exponent.dtype) if isinstance(exponent, Tensor) else type(exponent).__name__
        raise InputError(f"exponent must be an int8 Tensor, not {got}")
    if exponent.shape != (channels,):
        raise InputError(
            f"exponent has shape {_shape(exponent)}: one per output channel is wanted, shape ({channels},)"
        )
    if values and has_values(exponent) and channels:
        least, largest = exponent_limits(torch.float32, bits, variant)
        low, high = (int(v) for v in exponent.aminmax())
        if low < least or high > largest:
            raise InputError(
                f"exponent runs from {low} to {high}: with {bits} bits and variant {variant!r} it must stay within "
                f"{least} to {largest}, so that every level is a normal float32"
            )


def check_codes(codes: Tensor, bits: int) -> None:
    """Raise InputError unless `codes` is uint8 (out, ...) below 2^bits."""
    check_bytes(codes)
    if has_values(codes) and codes.numel() and int(codes.max()) >= 2**bits:
        raise InputError(f"codes hold {int(codes.max())}: {bits}-bit codes run from 0 to {2**bits - 1}")


def check_bytes(codes: Tensor) -> None:
    """Raise InputError unless `codes` is a uint8 tensor of two axes or more."""
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        got = _dtype(codes.dtype) if isinstance(codes, Tensor) else type(codes).__name__
        raise InputError(f"codes must be a uint8 Tensor, as shift_quantize or pack_codes returns them, not {got}")
    if codes.dim() < 2:
        raise InputError(f"codes must have shape (out, in, ...), not {_shape(codes)}")


def check_packed(codes: Tensor, width: int, bits: int) -> None:
    """Raise InputError unless `codes` is uint8 (out, bytes) as `pack_codes` returns it for `width` inputs."""
    check_bytes(codes)
    wanted = packed_width(width, bits)
    if codes.dim() != 2 or codes.shape[1] != wanted:
        unpacked = codes_per_byte(bits) == 2 and codes.dim() == 2 and codes.shape[1] == width
        hint = ": these look unpacked, call pack_codes first" if unpacked else ""
        raise InputError(
            f"codes have shape {_shape(codes)}, but {width} inputs of {bits} bits are packed into {wanted} bytes per "
            f"output channel{hint}"
        )


def check_linear(input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str) -> None:
    """Raise InputError unless the arguments of `shift_linear` fit together. Reads no values: that would wait."""
    if not isinstance(input, Tensor) or input.dtype not in DTYPES:
        got = _dtype(input.dtype) if isinstance(input, Tensor) else type(input).__name__
        raise InputError(f"input must be a float16, bfloat16, float32 or float64 Tensor, not {got}")
    if input.dim() == 0:
        raise InputError("input must have shape (..., in_features), not ()")
    check_packed(codes, input.shape[-1], bits)
    channels = codes.shape[0]
    check_exponent(exponent, channels, bits, variant, values=False)
    if bias is not None:
        if bias.shape != (channels,):
            raise InputError(f"bias has shape {_shape(bias)}, but codes have {channels} output channels")
        if bias.dtype != input.dtype:
            raise InputError(f"bias is {_dtype(bias.dtype)} but input is {_dtype(input.dtype)}: both need one dtype")
    for name, tensor in (("codes", codes), ("exponent", exponent), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise InputError(f"{name} is on {tensor.device} but input is on {input.device}")


def check_representable(codes: Tensor, exponent: Tensor, bits: int, variant: str, dtype: torch.dtype) -> None:
    """Raise InputError if `dtype` cannot hold a power of two that these unpacked codes use. Only float16 can fail."""
    if dtype not in DTYPES:
        raise InputError(f"dtype must be float16, bfloat16, float32 or float64, not {_dtype(dtype)}")
    if dtype != torch.float16 or not has_values(codes):
        return
    level = (codes & top_level(bits)).int()
    power = (level + per_channel(exponent.int(), level) - top_level(bits))[level >= lowest_level(variant)]
    if power.numel() == 0:
        return
    least, largest = power_limits(dtype)
    low, high = (int(v) for v in power.aminmax())
    advice = "keep this layer in bfloat16 or float32"
    if high > largest:
        raise InputError(f"a weight of 2^{high} overflows float16, which ends at 2^{largest}: {advice}")
    if low < least:
        raise InputError(
            f"a weight of 2^{low} would become 0 in float16, which starts at 2^{least}: {advice}, or use fewer than "
            f"{bits} bits"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
