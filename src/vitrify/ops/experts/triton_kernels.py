"""The GPU kernels of mixtures: two that sort tokens by expert, and one matrix product for both experts."""

# Triton's language has no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Its constants are parameters in capitals, which ruff takes for the right side of a comparison.
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl

from vitrify.ops.shift.triton_kernels import power_of, weights_of


@triton.jit(do_not_specialize=("tokens",))
def choose_kernel(
    x, x_stride, weight, weight_stride, bias, chosen, chosen_counts, tokens,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK tokens: which of them go to the second expert (uint8), and how many (int32)."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    rows = x + token.to(tl.int64) * x_stride
    first = tl.zeros((BLOCK, STEP), tl.float32)
    second = tl.zeros((BLOCK, STEP), tl.float32)
    for start in range(0, WIDTH, STEP):
        column = start + tl.arange(0, STEP)
        there = column < WIDTH
        tile = tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & there[None, :], other=0.0)
        tile = tile.to(tl.float32)
        first += tile * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
        second += tile * tl.load(weight + weight_stride + column, mask=there, other=0.0).to(tl.float32)[None, :]
    first_logit = tl.sum(first, 1)
    second_logit = tl.sum(second, 1)
    if BIASED:
        first_logit += tl.load(bias).to(tl.float32)
        second_logit += tl.load(bias + 1).to(tl.float32)
    # Rounded as the router's own result would be, so that close calls fall alike. Ties go to the first.
    dtype = x.dtype.element_ty
    goes = ((second_logit.to(dtype) > first_logit.to(dtype)) & inside).to(tl.int32)
    tl.store(chosen + token, goes.to(tl.uint8), mask=inside)
    tl.store(chosen_counts + tl.program_id(0), tl.sum(goes, 0))


@triton.jit(do_not_specialize=("tokens", "blocks"))
def place_kernel(
    chosen, chosen_counts, order, counts, tokens, blocks,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One program per CHUNK tokens: their places when the first expert's tokens come first, all in their old order.

    Each program adds up the counts of all blocks anew, which is less than another launch. Integers: always the same.
    """
    program = tl.program_id(0)
    before = tl.zeros((TOGETHER,), tl.int32)
    total = tl.zeros((TOGETHER,), tl.int32)
    for start in range(0, blocks, TOGETHER):
        block = start + tl.arange(0, TOGETHER)
        count = tl.load(chosen_counts + block, mask=block < blocks, other=0)
        before += tl.where(block < program * (CHUNK // BLOCK), count, 0)
        total += count
    firsts = tokens - tl.sum(total, 0)
    token = program * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    goes = tl.load(chosen + token, mask=inside, other=0).to(tl.int32)
    seconds_before = tl.sum(before, 0) + tl.cumsum(goes, 0) - goes
    place = tl.where(goes == 1, firsts + seconds_before, token - seconds_before)
    tl.store(order + place, token, mask=inside)
    if program == 0:
        tl.store(counts, firsts)
        tl.store(counts + 1, tokens - firsts)


@triton.jit(do_not_specialize=("tokens",))
def linear_kernel(
    x, x_stride, order, counts, weight, weight_stride, bias, shift, shift_stride, exponent, shift_bias,
    values, values_stride, scales, out, tokens, width, columns,
    BITS: tl.constexpr, PS: tl.constexpr, PACKED: tl.constexpr, ROUNDED: tl.constexpr,
    KIND: tl.constexpr, OPERAND: tl.constexpr, SHIFT: tl.constexpr,
    WHOLE: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_M tokens of one expert and BLOCK_N output channels; grid: (token tiles x channel tiles,).

    The first expert's tiles come first; its last one may be part empty, then the second's begin. The weight is the left
    operand: decoded values go from registers to the tensor cores, and few tokens fill a narrow tile.
    PACKED: `shift` holds codes, two per byte up to 4 bits, else a weight. WHOLE: BLOCK_K divides the width.
    ROUNDED: the second expert multiplies `values` of type KIND, rows as those of x, with scales by token; its weights
    are over 2^(exponent + SHIFT), or whole if that is None. OPERAND: what is multiplied, KIND but in the interpreter.
    """
    column_tiles = tl.cdiv(columns, BLOCK_N)
    tile = tl.program_id(0) // column_tiles
    firsts = tl.load(counts)
    first_tiles = tl.cdiv(firsts, BLOCK_M)
    second = tile >= first_tiles
    begin = tl.where(second, firsts + (tile - first_tiles) * BLOCK_M, tile * BLOCK_M)
    end = tl.where(second, tokens, firsts)
    if begin >= end:
        return
    # Rows and channels beyond the end repeat the last one, and are not stored.
    row = row_of(order, tl.minimum(begin + tl.arange(0, BLOCK_M), end - 1), GATHER)
    x_rows = x + row.to(tl.int64) * x_stride
    column = (tl.program_id(0) % column_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.minimum(column, columns - 1)
    dtype = x.dtype.element_ty
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if ROUNDED and second:
        codes = shift + channel * shift_stride
        power = tl.load(exponent + channel).to(tl.int32)
        rounded = values + row.to(tl.int64) * values_stride
        acc = rounded_sums(rounded, codes, power, width, BITS, PS, PACKED, KIND, OPERAND, WHOLE, acc, BLOCK_K)
        if SHIFT is not None:
            acc *= power_of(power + SHIFT)[:, None]
        acc *= tl.load(scales + row)[None, :]
    elif PACKED and second:
        codes = shift + channel * shift_stride
        power = tl.load(exponent + channel).to(tl.int32)
        for start in range(0, width, BLOCK_K):
            tokens_tile = load_tile(x_rows, start, width, WHOLE, BLOCK_K)
            decoded = weights_of(load_codes(codes, start, width, BITS, WHOLE, BLOCK_K), power, BITS, PS, dtype)
            if not WHOLE and dtype == tl.float16:
                # What code 0 stands for beyond the width may be infinite here.
                decoded = tl.where((start + tl.arange(0, BLOCK_K) < width)[None, :], decoded, tl.zeros_like(decoded))
            acc = tl.dot(decoded, tl.trans(tokens_tile), acc, input_precision=PRECISION)
    else:
        if not PACKED and not ROUNDED:
            weight = tl.where(second, shift, weight)
        weights = weight + channel * weight_stride
        for start in range(0, width, BLOCK_K):
            tokens_tile = load_tile(x_rows, start, width, WHOLE, BLOCK_K)
            tile_weights = load_tile(weights, start, width, WHOLE, BLOCK_K)
            acc = tl.dot(tile_weights, tl.trans(tokens_tile), acc, input_precision=PRECISION)
    if BIASED:
        acc += tl.load(tl.where(second, shift_bias, bias) + channel).to(tl.float32)[:, None]
    place = begin + tl.arange(0, BLOCK_M)
    inside = place < end
    # Read again: kept through the loop, the rows would take the registers of the tile.
    target = row_of(order, tl.where(inside, place, begin), SCATTER)
    out_rows = out + target.to(tl.int64) * columns
    tl.store(
        out_rows[:, None] + column[None, :], tl.trans(acc).to(dtype), inside[:, None] & (column < columns)[None, :]
    )


@triton.jit
def row_of(order, place, INDIRECT: tl.constexpr):
    """Return the rows where these places' tokens lie: their own, or what `order` says."""
    if INDIRECT:
        place = tl.load(order + place)
    return place


@triton.jit
def rounded_sums(
    rows, weights, power, width, BITS: tl.constexpr, PS: tl.constexpr, PACKED: tl.constexpr, KIND: tl.constexpr,
    OPERAND: tl.constexpr, WHOLE: tl.constexpr, like, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return the products of rounded tokens with weights or, if PACKED, codes, neither scaled: float32, as `like`."""
    sums = tl.zeros_like(like).to(tl.int32 if KIND == tl.int8 else tl.float32)
    for start in range(0, width, BLOCK_K):
        tokens_tile = load_tile(rows, start, width, WHOLE, BLOCK_K).to(OPERAND)
        if PACKED:
            tile = weights_of(load_codes(weights, start, width, BITS, WHOLE, BLOCK_K), power, BITS, PS, KIND)
        else:
            tile = load_tile(weights, start, width, WHOLE, BLOCK_K)
        if KIND == tl.float8e4nv:
            # A Hopper's sums of E4M3 products keep 14 bits: each step's are added to the float32 ones outside.
            sums += tl.dot(tile.to(OPERAND), tl.trans(tokens_tile), max_num_imprecise_acc=BLOCK_K)
        else:
            sums = tl.dot(tile.to(OPERAND), tl.trans(tokens_tile), sums, out_dtype=sums.dtype)
    return sums.to(tl.float32)


@triton.jit
def load_codes(rows, start, width, BITS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the bytes (rows, bytes) of the codes of BLOCK inputs from `start` on."""
    PER_BYTE: tl.constexpr = 2 if BITS <= 4 else 1
    tile = load_tile(rows, start // PER_BYTE, (width + PER_BYTE - 1) // PER_BYTE, WHOLE, BLOCK // PER_BYTE)
    return tile


@triton.jit
def load_tile(rows, start, width, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the tile (rows, BLOCK) from column `start` on, 0 beyond `width`."""
    column = start + tl.arange(0, BLOCK)
    if WHOLE:
        tile = tl.load(rows[:, None] + column[None, :])
    else:
        tile = tl.load(rows[:, None] + column[None, :], mask=(column < width)[None, :], other=0.0)
    return tile
