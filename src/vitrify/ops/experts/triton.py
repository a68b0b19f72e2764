"""Mixtures of two experts on the GPU: which kernels run, on how many programs. README.md has the design.

Nothing is tuned at run time and nothing is read back from the GPU: the launches follow from the shapes and the number
of processors, so that the same call gives the same bits and a CUDA graph can hold it, whatever the router decides.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitrify.ops import gpu
from vitrify.ops.experts.triton_kernels import choose_kernel, linear_kernel, place_kernel
from vitrify.ops.launch import adjacent, processors
from vitrify.ops.shift.reference import LARGEST
from vitrify.ops.shift.triton import ALIGNMENT, MOST_TOKENS, TYPES, decoded, has_e4m3, power_shift, quantize_tokens

# Tokens of a program that computes logits, of one that places tokens, and block counts that the latter adds at a time.
BLOCK, CHUNK, TOGETHER = 16, 1024, 1024
# Inputs of a token that a step of the router takes.
STEP = 256
# A tile of n tokens takes as long as n + FIXED: what does not shrink with it is the weight's way into shared memory,
# and the first and last steps of the pipeline. Derived, to be tuned on a GPU.
FIXED = 64


class Tiles(NamedTuple):
    """A program's tile (tokens, output channels, inputs per step) and its warps."""

    tokens: int
    columns: int
    step: int
    warps: int


def tiles(
    tokens: int,
    width: int,
    columns: int,
    available: int,
    *,
    packed: bool,
    twice: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tiles:
    """Return the tiles for `tokens` of both experts together and a layer's inputs and outputs, on so many processors.

    The token tile is the one with the shortest time by FIXED: programs run in rounds of one per processor.
    packed: codes are decoded in registers. twice: two sets of sums are kept there, as E4M3 needs.
    """
    single = dtype == torch.float32
    channels = 64 if packed or single else 128
    aligned = width % 16 == 0

    def time(block: int) -> int:
        programs = _token_tiles(tokens, block) * triton.cdiv(columns, channels)
        return int(triton.cdiv(programs, available)) * (block + FIXED)

    # Larger ones leave the registers; so do rows that begin anywhere, of which each entry has its own address.
    largest = 32 if not aligned else 128 if packed or twice or single else 256
    best = min((block for block in (16, 32, 64, 128, 256) if block <= largest), key=time)
    if single:
        # Without tensor cores, a step's inputs go through registers; ptxas spills some of those of 32 tokens.
        step = 32 if precision(dtype) == "tf32" else 16
        best = (64 if aligned else 16) if best == 32 else best
        return Tiles(best, channels, step, 8 if best == 128 else 4)
    return Tiles(best, channels, 128 if packed and aligned and best <= 64 else 64, 4 if packed else 8)


def order_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Route tokens x (T, C) by a router (2, C): return order, int32 (T,), the tokens by expert, and counts, int32 (2,).

    Two launches. Logits are summed in float32 and rounded to the dtype of x before they are compared.
    """
    x, weight, bias = adjacent(x), adjacent(weight), _together(bias)
    tokens, width = x.shape
    blocks = triton.cdiv(tokens, BLOCK)
    order, counts = x.new_empty(tokens, dtype=torch.int32), x.new_empty(2, dtype=torch.int32)
    if tokens == 0:
        return order, counts.zero_()
    chosen = x.new_empty(tokens, dtype=torch.uint8)
    chosen_counts = x.new_empty(blocks, dtype=torch.int32)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        choose_kernel[blocks,](
            x, x.stride(0), weight, weight.stride(0), bias, chosen, chosen_counts, tokens,
            WIDTH=width, BLOCK=BLOCK, STEP=min(STEP, triton.next_power_of_2(width)), BIASED=bias is not None,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        place_kernel[triton.cdiv(tokens, CHUNK),](
            chosen, chosen_counts, order, counts, tokens, blocks,
            BLOCK=BLOCK, CHUNK=CHUNK, TOGETHER=TOGETHER, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return order, counts


def linear(
    x: Tensor,
    order: Tensor,
    counts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    exponent: Tensor | None,
    shift_bias: Tensor | None,
    bits: int,
    variant: str,
    activations: str,
    gather: bool,
    scatter: bool,
) -> Tensor:
    """Both experts' linear layers in one launch; arguments and result as `grouped.grouped_linear`.

    Codes are decoded in registers for up to MOST_TOKENS tokens, as shift layers do; for more, a launch before decodes
    them in memory, once and not once per tile of tokens. Another launch rounds the tokens for activations "int8" and
    "float8", which the second expert then multiplies in that format if it holds the weights, else in bfloat16.
    """
    x, weight, shift = adjacent(x), adjacent(weight), adjacent(shift)
    bias, exponent, shift_bias = _together(bias), _together(exponent), _together(shift_bias)
    (tokens, width), columns = x.shape, weight.shape[0]
    out = x.new_empty(tokens, columns)
    if tokens == 0:
        return out
    kind, power = (x.dtype, None) if activations == "float" else _rounded_kind(activations, bits, variant, x)
    values = scale = None
    if activations != "float":
        padded = triton.cdiv(width, ALIGNMENT) * ALIGNMENT
        values, scale = quantize_tokens(x, kind, padded, LARGEST[activations])
    packed = exponent is not None and tokens <= MOST_TOKENS
    if kind == torch.float32 and _rounds_widened(x.device):
        packed = False
    if exponent is not None and not packed:
        shift = decoded(shift, exponent, width, bits, variant, kind, power or 0)
    e4m3 = kind == torch.float8_e4m3fn
    tile = tiles(tokens, width, columns, processors(x.device), packed=packed, twice=e4m3, dtype=x.dtype)
    grid = (_token_tiles(tokens, tile.tokens) * triton.cdiv(columns, tile.columns),)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        linear_kernel[grid](
            x, x.stride(0), order, counts, weight, weight.stride(0), bias, shift, shift.stride(0), exponent, shift_bias,
            values, 0 if values is None else values.stride(0), scale, out, tokens, width, columns,
            BITS=bits if packed else 0, PS=packed and variant == "ps", PACKED=packed, ROUNDED=values is not None,
            KIND=TYPES[kind], OPERAND=_operand(kind), SHIFT=power,
            WHOLE=width % tile.step == 0, GATHER=gather, SCATTER=scatter, BIASED=bias is not None,
            BLOCK_M=tile.tokens, BLOCK_N=tile.columns, BLOCK_K=tile.step, PRECISION=precision(x.dtype),
            # Rounded tokens get the bits of the shift layers, which round a product before a bias is added.
            num_warps=tile.warps, num_stages=3, enable_fp_fusion=values is None,
        )  # fmt: skip
    return out


def precision(dtype: torch.dtype) -> str:
    """Return what float32 is multiplied as: "tf32" where PyTorch may do so, too. 16 bits are always themselves."""
    # The one switch that PyTorch lets be read whichever of its two interfaces set it.
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _rounded_kind(activations: str, bits: int, variant: str, x: Tensor) -> tuple[torch.dtype, int | None]:
    """Return the dtype of rounded tokens, and c where it holds weights over 2^(E + c); None: bfloat16, and whole."""
    kind = torch.int8 if activations == "int8" else torch.float8_e4m3fn
    power = power_shift(bits, variant, kind)
    # A step of float32 has too few inputs for 8-bit products.
    if power is None or x.dtype == torch.float32 or (kind == torch.float8_e4m3fn and not has_e4m3(x.device)):
        return torch.bfloat16, None
    return kind, power


@functools.cache
def _rounds_widened(device: torch.device) -> bool:
    """Say whether float32 made of 16 bits is multiplied in TF32, whatever the precision (triton-lang/triton#10176).

    Triton 3.6 does so from compute capability 10.0 on; 3.9 does not.
    """
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return version < (3, 9) and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def _operand(kind: torch.dtype) -> tl.dtype:
    # The interpreter's tl.dot reads bfloat16 as integers.
    return tl.float32 if gpu.interpreting() and kind == torch.bfloat16 else TYPES[kind]


def _token_tiles(tokens: int, block: int) -> int:
    """Return how many tiles the tokens fill at most: one is lost where the first expert's last tile is part empty."""
    return int(triton.cdiv(tokens, block)) + 1


def _together(row: Tensor | None) -> Tensor | None:
    return None if row is None else row.contiguous()
