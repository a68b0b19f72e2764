"""Shift layers on the GPU: which kernels run, on how many programs. README.md says what is exact.

Nothing is tuned at run time: the plan follows from the shapes and the number of processors, so that the same call
gives the same bits. Nothing reads a value back from the GPU, so a CUDA graph can hold every path.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vitrify.ops import gpu
from vitrify.ops.launch import adjacent, processors
from vitrify.ops.shift import reference
from vitrify.ops.shift.plan import BLOCK_OUT, plan
from vitrify.ops.shift.triton_kernels import combine_kernel, decode_kernel, multiply_kernel, quantize_kernel

# Up to this many tokens codes are decoded in registers, above it in memory. Derived for an H100, not yet measured, in
# clocks per weight of one multiprocessor. Decoding takes 4.5 instructions, 0.035 clocks, for each tile of 128 tokens,
# whose product takes 0.0625; cuBLAS's larger tiles are assumed to reach 70 % of the peak, and these 60 % of that.
# Together, what is lost to cuBLAS is 0.0007 clocks per token. Decoding in memory moves 2.5 bytes per weight, 0.17
# clocks at 3.35 TB/s, and takes a launch of 2 us, 0.2 clocks for the 2.4 million weights of a ViT-B's fc1.
# 0.37 / 0.0007 = 530.
MOST_TOKENS = 512
STAGES = 4
# Codes that a program of the decoder takes, and of a channel at most; inputs that one of the rounding takes at a time,
# and channels of a token that one of the joining kernel takes.
TILE_DECODED, BLOCK_DECODED, BLOCK_ROUNDED, BLOCK_COMBINED = 4096, 512, 1024, 512
# torch's FP8 and INT8 products take multiples of this many inputs and outputs.
ALIGNMENT = 16
# What products are made of, by the type of the inputs; a float32 is the sum of three bfloat16.
TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.int8: tl.int8,
}


def power_shift(bits: int, variant: str, kind: torch.dtype) -> int | None:
    """Return c, where weights over 2^(E + c) of their channel are exact in `kind`, E4M3 or int8; None: they are not.

    E4M3 has 18 powers of two, 2^-9 to 2^8: room for 5 bits, not for the 31 or 32 powers of 6. int8 has 7 with both
    signs, 1 to 64: room for the 4 bits of "ps", not for the 8 powers of "q".
    """
    top = reference.top_level(bits)
    if kind == torch.float8_e4m3fn:
        return {3: 0, 4: 0, 5: -8}.get(bits)
    lowest = reference.lowest_level(variant)
    return lowest - top if top - lowest < 7 else None


def linear(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    """Return what `reference.linear` does, by one of three paths that the shapes and the device pick.

    latency     up to MOST_TOKENS tokens: the codes are decoded in registers, as the left operand of the tensor cores,
                so that 4 bits per weight are read. Sums are float32 (float32 inputs too: no TF32 but exact products).
                For few output tiles the inputs are divided between programs, joined in a fixed order by a second launch
    throughput  "float8" and "int8", more tokens: tokens are rounded by a kernel (unless they come to `rounded_linear`),
                weights decoded to E4M3 or int8, which hold them exactly, and multiplied by torch's scaled or integer
                product. It can tie FP8 or INT8 multiplication and never beat it: that is what it runs
    exact       "float", more tokens, and float64: the codes are decoded to the input's dtype, for cuBLAS. The bits of
                F.linear

    "float8" where E4M3 does not hold the weights (6 bits), or the GPU has none (below compute capability 8.9), takes
    E4M3 values in bfloat16 through the first path, at any number of tokens. The plain formula stays for: "int8" codes
    of more than 7 levels, quantised float64, and empty tensors.
    """
    width, channels = input.shape[-1], codes.shape[0]
    tokens, wide = input.numel() // max(width, 1), input.dtype == torch.float64
    if tokens * channels * width == 0:
        return reference.linear(input, codes, exponent, bias, bits, variant, "float")
    codes, exponent, bias = adjacent(codes), exponent.contiguous(), None if bias is None else bias.contiguous()
    if activations != "float":
        kind = _value_type(torch.int8 if activations == "int8" else torch.float8_e4m3fn, bits, variant, input.device)
        if wide or kind is None:
            return reference.linear(input, codes, exponent, bias, bits, variant, activations)
        rows = adjacent(input.reshape(-1, width))
        values, scale = quantize_tokens(rows, kind, _padded(width), reference.LARGEST[activations])
        out = _quantized(values, scale, codes, exponent, bias, bits, variant, width, input.dtype)
        return out.view(*input.shape[:-1], channels)
    if wide or tokens > MOST_TOKENS:
        return F.linear(input, decoded(codes, exponent, width, bits, variant, input.dtype), bias)
    rows = adjacent(input.reshape(-1, width))
    out = _multiply(rows, codes, exponent, None, bias, bits, variant, None, width, input.dtype)
    return out.view(*input.shape[:-1], channels)


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
    """Return what `reference.rounded_linear` does, by the paths that `linear` takes from there."""
    width, channels = values.shape[-1], codes.shape[0]
    kind = _value_type(values.dtype, bits, variant, values.device)
    if values.numel() * channels == 0 or scale.dtype == torch.float64 or kind is None:
        return reference.rounded_linear(values, scale, codes, exponent, bias, bits, variant, dtype)
    codes, exponent, bias = adjacent(codes), exponent.contiguous(), None if bias is None else bias.contiguous()
    rows, scale = values.reshape(-1, width).to(kind).contiguous(), scale.flatten().contiguous()
    out = _quantized(rows, scale, codes, exponent, bias, bits, variant, width, dtype)
    return out.view(*values.shape[:-1], channels)


def decoded(
    codes: Tensor, exponent: Tensor, width: int, bits: int, variant: str, dtype: torch.dtype, shift: int = 0
) -> Tensor:
    """Return the weight (out, width) of packed codes in `dtype`: `reference.decoded` in one launch.

    E4M3 and int8 hold it over 2^(E + shift) of its channel, `shift` from `power_shift`.
    """
    if codes.shape[0] * width == 0:
        return reference.decoded(codes, exponent, width, bits, variant, dtype)
    return _decode(adjacent(codes), exponent.contiguous(), None, width, width, bits, variant, dtype, shift)


def quantize_tokens(rows: Tensor, kind: torch.dtype, padded: int, largest: int) -> tuple[Tensor, Tensor]:
    """Return the values (tokens, padded) of `kind` and scales (tokens,) of `reference.quantize_tokens`, in one launch.

    rows: (tokens, width) with adjacent inputs. kind bfloat16 holds the values of both formats: `largest` tells them
    apart. Values are 0 beyond `width`.
    """
    values = rows.new_empty(rows.shape[0], padded, dtype=kind)
    scale = rows.new_empty(rows.shape[0], dtype=torch.float32)
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        quantize_kernel[rows.shape[0],](
            rows, rows.stride(0), values, scale, rows.shape[1], padded,
            LARGEST=largest, INTEGER=largest == reference.LARGEST["int8"], BLOCK=BLOCK_ROUNDED, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return values, scale


def _quantized(
    values: Tensor,
    scale: Tensor,
    codes: Tensor,
    exponent: Tensor,
    bias: Tensor | None,
    bits: int,
    variant: str,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply rounded tokens: values (tokens, width or padded) of a `_value_type`, scale (tokens,)."""
    kind, tokens, channels, padded = values.dtype, values.shape[0], codes.shape[0], _padded(width)
    shift = None if kind == torch.bfloat16 else power_shift(bits, variant, kind)
    if shift is None or tokens <= MOST_TOKENS or channels % ALIGNMENT:
        return _multiply(values, codes, exponent, scale, bias, bits, variant, shift, width, dtype)
    if values.shape[1] < padded:
        values = F.pad(values, (0, padded - width))
    powers = scale.new_empty(1, channels)
    weight = _decode(codes, exponent, powers, width, padded, bits, variant, kind, shift)
    if kind == torch.int8:
        sums = torch._int_mm(values, weight.t())
    elif dtype == torch.bfloat16:
        # Scales of rows and columns are taken for this dtype only.
        return torch._scaled_mm(
            values, weight.t(), scale[:, None], powers, bias, out_dtype=torch.bfloat16, use_fast_accum=False
        )
    else:
        one = torch.ones((), device=values.device)
        sums = torch._scaled_mm(values, weight.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)
    return _combine(sums[None], exponent, scale, bias, shift, dtype)


def _multiply(
    rows: Tensor,
    codes: Tensor,
    exponent: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    bits: int,
    variant: str,
    shift: int | None,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply with codes in registers; the weights are over 2^(E + shift), or whole if that is None."""
    tokens, channels = rows.shape[0], codes.shape[0]
    tile = plan(tokens, width, channels, rows.element_size(), processors(rows.device))
    chunks = triton.cdiv(width, tile.block_in * tile.steps)
    out = rows.new_empty(tokens, channels, dtype=dtype)
    partial = out
    if chunks > 1:
        partial = rows.new_empty(
            chunks, tokens, channels, dtype=torch.int32 if rows.dtype == torch.int8 else torch.float32
        )
    kind = TYPES[rows.dtype]
    # The interpreter's tl.dot reads bfloat16 as integers.
    operand = tl.float32 if gpu.interpreting() and kind == tl.bfloat16 else kind
    grid = (triton.cdiv(tokens, tile.block_tokens) * triton.cdiv(channels, BLOCK_OUT), chunks)
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
        multiply_kernel[grid](
            rows, rows.stride(0), codes, codes.stride(0), exponent, scale, bias, partial,
            tokens, width, channels, tile.steps,
            BITS=bits, PS=variant == "ps", KIND=kind, OPERAND=operand, POWERS=shift is not None, SHIFT=shift or 0,
            SPLIT=chunks > 1, EVEN=width % tile.block_in == 0,
            BLOCK_OUT=BLOCK_OUT, BLOCK_TOKENS=tile.block_tokens, BLOCK_IN=tile.block_in,
            num_warps=4, num_stages=STAGES, enable_fp_fusion=False,
        )  # fmt: skip
    return _combine(partial, exponent, scale, bias, shift, dtype) if chunks > 1 else out


def _combine(
    partial: Tensor, exponent: Tensor, scale: Tensor | None, bias: Tensor | None, shift: int | None, dtype: torch.dtype
) -> Tensor:
    """Return the sum of partial (chunks, tokens, channels), scaled and biased, in `dtype`."""
    chunks, tokens, channels = partial.shape
    out = partial.new_empty(tokens, channels, dtype=dtype)
    with torch.cuda.device_of(partial):  # type: ignore[no-untyped-call]
        combine_kernel[tokens, triton.cdiv(channels, BLOCK_COMBINED)](
            partial, exponent, scale, bias, out, tokens, channels, chunks,
            POWERS=shift is not None, SHIFT=shift or 0, BLOCK=BLOCK_COMBINED, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _decode(
    codes: Tensor,
    exponent: Tensor,
    powers: Tensor | None,
    width: int,
    padded: int,
    bits: int,
    variant: str,
    dtype: torch.dtype,
    shift: int,
) -> Tensor:
    """Return weights (channels, padded) in `dtype`; fill `powers`, if given, with what they are to be multiplied by."""
    channels = codes.shape[0]
    weight = codes.new_empty(channels, padded, dtype=dtype)
    block = min(max(triton.next_power_of_2(padded), 16), BLOCK_DECODED)
    rows = TILE_DECODED // block
    with torch.cuda.device_of(codes):  # type: ignore[no-untyped-call]
        decode_kernel[triton.cdiv(channels, rows), triton.cdiv(padded, block)](
            codes, codes.stride(0), exponent, weight, powers, width, padded, channels,
            BITS=bits, PS=variant == "ps", SHIFT=shift, ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return weight


def _padded(width: int) -> int:
    padded: int = triton.cdiv(width, ALIGNMENT) * ALIGNMENT
    return padded


def _value_type(kind: torch.dtype, bits: int, variant: str, device: torch.device) -> torch.dtype | None:
    """Return what holds values of `kind`, int8 or E4M3, in a product with such codes; None where there is none."""
    if power_shift(bits, variant, kind) is None:
        return None if kind == torch.int8 else torch.bfloat16
    return kind if kind == torch.int8 or has_e4m3(device) else torch.bfloat16


@functools.cache
def has_e4m3(device: torch.device) -> bool:
    """Say whether the device multiplies E4M3; the interpreter does."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
