"""Weight gradients of a mixture on the GPU: tiles, and how many programs share an expert's tokens. README.md says why.

As in triton.py nothing is read back: an expert's tokens are counted on the GPU, and programs share whatever they are.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vitrify.ops.experts.triton import precision
from vitrify.ops.experts.triton_gradient_kernels import gradient_kernel
from vitrify.ops.launch import PROGRAMS, adjacent, processors

# What sharing out an expert's tokens saves and costs in microseconds, for an H100, derived and not measured: a token of
# a program's tile (128 x 128 products in 16 bits at 60 % of the peak, 64 x 64 in float32); two launches that join the
# parts; and their way to memory and back. A part has at least LEAST tokens of half of all.
TOKEN_US, JOIN_US, BYTES_PER_US, LEAST = 0.01, 4.0, 3e6, 256


class Tiles(NamedTuple):
    """A program's tile (output channels, inputs, tokens per step) and its warps."""

    columns: int
    inputs: int
    step: int
    warps: int


def tiles(width: int, columns: int, dtype: torch.dtype) -> Tiles:
    """Return the tiles for a weight (columns, width)."""
    tf32 = precision(dtype) == "tf32"
    if width % 16 or columns % 16:
        # Rows begin anywhere: each entry has an address of its own, in registers, which so many warps have.
        return Tiles(32, 32, 16, 4 if tf32 else 2)
    if dtype == torch.float32:
        return Tiles(64, 64, 32 if tf32 else 16, 4)
    if any(0 < size % 128 <= 64 for size in (width, columns)):
        return Tiles(64, 64, 64, 4)  # the last tile of 128 would be half empty; ptxas spills some of 64 x 128
    return Tiles(128, 128, 64, 8)


@functools.lru_cache(4096)
def shares(tokens: int, width: int, columns: int, trained: int, tile: Tiles, available: int) -> int:
    """Return how many programs share an expert's tokens: more fill the GPU, but their parts have to be joined."""
    programs = trained * triton.cdiv(columns, tile.columns) * triton.cdiv(width, tile.inputs)

    def time(count: int) -> float:
        join: float = JOIN_US + 8 * count * trained * columns * width / BYTES_PER_US
        rounds: int = triton.cdiv(programs * count, available)
        return rounds * (tokens / 2 / count) * TOKEN_US + (join if count > 1 else 0.0)

    most = min(tokens // 2 // LEAST, PROGRAMS * available // programs)
    return min(range(1, max(1, most) + 1), key=time)


def gradient(
    grad: Tensor, x: Tensor, order: Tensor, counts: Tensor, gather: bool, scatter: bool, trained: int
) -> tuple[Tensor, Tensor]:
    """Both experts' gradients in one launch, and two that join the parts of small weights; as `aten.gradient`."""
    grad, x = adjacent(grad), adjacent(x)
    (tokens, columns), width = grad.shape, x.shape[1]
    tile = tiles(width, columns, x.dtype)
    count = shares(tokens, width, columns, trained, tile, processors(x.device))
    dtype = x.dtype if count == 1 else torch.float32
    weights = x.new_empty(count, trained, columns, width, dtype=dtype)
    biases = x.new_empty(count, 2, columns, dtype=dtype)
    grid = (triton.cdiv(columns, tile.columns) * (triton.cdiv(width, tile.inputs) + 1), count, 2)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        gradient_kernel[grid](
            grad, grad.stride(0), x, x.stride(0), order, counts, weights, biases, width, columns, count,
            trained, GATHER=gather, SCATTER=scatter, PRECISION=precision(x.dtype),
            BLOCK_N=tile.columns, BLOCK_K=tile.inputs, BLOCK_M=tile.step,
            num_warps=tile.warps, num_stages=5, enable_fp_fusion=True,
        )  # fmt: skip
    if count == 1:
        return weights[0], biases[0]
    return weights.sum(0).to(x.dtype), biases.sum(0).to(x.dtype)
