"""The GPU kernel of a mixture's weight gradients: for each expert, the sum of its tokens' outer products."""

# Triton's language has no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vitrify.ops.experts.triton_kernels import row_of


@triton.jit(do_not_specialize=("shares", "trained"))
def gradient_kernel(
    grad, grad_stride, x, x_stride, order, counts, weights, biases, width, columns, shares, trained,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program per tile of a weight (BLOCK_N, BLOCK_K), share of its expert's tokens, and expert: this is the grid.

    Behind the last tile of inputs comes one that stands for the bias. weights: (shares, trained, columns, width), of
    the first `trained` experts; biases: (shares, 2, columns). GATHER: x has the tokens in their own order, else in the
    groups'; SCATTER: so has grad. An expert without tokens gets zeros.
    """
    input_tiles = tl.cdiv(width, BLOCK_K)
    column = (tl.program_id(0) // (input_tiles + 1)) * BLOCK_N + tl.arange(0, BLOCK_N)
    input_tile = tl.program_id(0) % (input_tiles + 1)
    expert = tl.program_id(2)
    firsts, seconds = tl.load(counts), tl.load(counts + 1)
    begin = tl.where(expert == 1, firsts, 0)
    end = begin + tl.where(expert == 1, seconds, firsts)
    share = tl.cdiv(tl.cdiv(end - begin, shares), BLOCK_M) * BLOCK_M
    begin += tl.program_id(1) * share
    end = tl.minimum(end, begin + share)
    part = tl.program_id(1).to(tl.int64)
    if input_tile == input_tiles:
        bias = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(begin, end, BLOCK_M):
            tile = token_tile(grad, grad_stride, order, start, end, column, columns, SCATTER, BLOCK_M)
            bias += tl.sum(tile.to(tl.float32), 0)
        tl.store(biases + (part * 2 + expert) * columns + column, bias.to(biases.dtype.element_ty), column < columns)
    elif expert < trained:
        input = input_tile * BLOCK_K + tl.arange(0, BLOCK_K)
        sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(begin, end, BLOCK_M):
            outputs = token_tile(grad, grad_stride, order, start, end, column, columns, SCATTER, BLOCK_M)
            inputs = token_tile(x, x_stride, order, start, end, input, width, GATHER, BLOCK_M)
            sums = tl.dot(tl.trans(outputs), inputs, sums, input_precision=PRECISION)
        rows = weights + ((part * trained + expert) * columns + column) * width
        inside = (column < columns)[:, None] & (input < width)[None, :]
        tl.store(rows[:, None] + input[None, :], sums.to(weights.dtype.element_ty), inside)


@triton.jit
def token_tile(rows, stride, order, start, end, entry, entries, INDIRECT: tl.constexpr, BLOCK: tl.constexpr):
    """Return the tile (tokens, entries) from place `start` on, 0 beyond the end and beyond `entries`."""
    place = start + tl.arange(0, BLOCK)
    row = row_of(order, tl.minimum(place, end - 1), INDIRECT)
    inside = (place < end)[:, None] & (entry < entries)[None, :]
    tile = tl.load(rows + row.to(tl.int64)[:, None] * stride + entry[None, :], mask=inside, other=0.0)
    return tile
