"""The GPU kernels of Hamming attention: codes decoded in registers, and sums of rows on the tensor cores.

    gram    G = sum_j c_j^T v_j          adds row j of V to row a of G where bit a of code j is set
    apply   out_i = c_i G                adds row a of G to row i of the result where bit a of code i is set

Codes are 0 and 1, or -1 and +1, exact in every operand format, so that a tensor core's products are copies of V and G
and nothing is rounded but the sums, which are float32. A float32 operand goes in as three of 16 bits that add up to it.
A program takes one head, a chunk of tokens and BY columns of V. Tensors are read by their strides; a width W is padded
to a power of two C; token numbers are 64-bit. Bits are stored as `bits.py` says.
"""

# Triton's language has no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vitrify.ops.taylor.triton_parts import head_of, load_tile, mask_of, tokens_from


@triton.jit
def load_codes(
    base, strides, tokens, valid, dtype: tl.constexpr, W: tl.constexpr, C: tl.constexpr, SIGNED: tl.constexpr
):  # fmt: skip
    """Load (len(tokens), C) codes in `dtype`, from bits (uint8) or numbers; 0 where there is no token or channel."""
    if base.dtype.element_ty == tl.uint8:
        octets = tl.arange(0, C // 8).to(tl.int64)
        there = valid[:, None] & (octets * 8 < W)[None, :]
        packed = tl.load(base + tokens[:, None] * strides[2] + octets[None, :] * strides[3], mask=there, other=0)
        bits = (packed[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
        codes = tl.reshape(bits, (tokens.shape[0], C)).to(tl.int8)
        if SIGNED:
            inside = valid[:, None] & (tl.arange(0, C) < W)[None, :]
            codes = tl.where(inside, 2 * codes - 1, 0)
    else:
        codes = load_tile(base, strides, tokens, valid, W, C)
    return codes.to(dtype)


@triton.jit
def load_columns(base, strides, tokens, valid, columns, W: tl.constexpr):
    """Load some columns of the rows `tokens`, 0 where there is no token or column."""
    inside = valid[:, None] & (columns < W)[None, :]
    return tl.load(
        base + tokens[:, None] * strides[2] + columns[None, :].to(tl.int64) * strides[3], mask=inside, other=0.0
    )


@triton.jit
def thirds_of(x, dtype: tl.constexpr):
    """Split float32 numbers in three of a 16-bit `dtype` that add up to them: 24 bits fit in 8 + 8 + 8."""
    high = x.to(dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(dtype)
    low = (rest - middle.to(tl.float32)).to(dtype)
    return high, middle, low


@triton.jit
def matrix_columns(base, columns, WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr):
    """Return pointers to some columns of a (WX, WY) matrix, and which of their CX rows and columns hold a number."""
    rows = tl.arange(0, CX)[:, None]
    return base + rows * WY + columns[None, :], (rows < WX) & (columns < WY)[None, :]


@triton.jit
def gram(
    code, code_strides, y, y_strides, keep, keep_stride, begin, end, columns, OPERAND: tl.constexpr,
    WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, BY: tl.constexpr,
    BLOCK: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return sum_t c_t^T y_t over the valid tokens from `begin` to `end`, for some columns of y, in float32."""
    total = tl.zeros((CX, BY), tl.float32)
    for start in range(begin, end, BLOCK):
        tokens, _, valid = tokens_from(start, end, keep, keep_stride, BLOCK, MASKED)
        rows = load_columns(y, y_strides, tokens, valid, columns, WY)
        if rows.dtype == tl.float32:
            codes = tl.trans(load_codes(code, code_strides, tokens, valid, OPERAND, WX, CX, SIGNED))
            high, middle, low = thirds_of(rows, OPERAND)
            total = tl.dot(codes, low, total)
            total = tl.dot(codes, middle, total)
            total = tl.dot(codes, high, total)
        else:
            codes = tl.trans(load_codes(code, code_strides, tokens, valid, rows.dtype, WX, CX, SIGNED))
            total = tl.dot(codes, rows, total)
    return total


@triton.jit
def apply(
    code, code_strides, out, out_strides, keep, keep_stride, begin, end, columns, matrix, OPERAND: tl.constexpr,
    WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr,
    BLOCK: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write c_t @ matrix for the tokens from `begin` to `end`, and 0 for padding; rounded once, at the end."""
    high, middle, low = thirds_of(matrix, OPERAND)
    for start in range(begin, end, BLOCK):
        tokens, exist, valid = tokens_from(start, end, keep, keep_stride, BLOCK, MASKED)
        codes = load_codes(code, code_strides, tokens, valid, OPERAND, WX, CX, SIGNED)
        result = tl.dot(codes, low)
        result = tl.dot(codes, middle, result)
        result = tl.dot(codes, high, result)
        inside = exist[:, None] & (columns < WY)[None, :]
        pointers = out + tokens[:, None] * out_strides[2] + columns[None, :].to(tl.int64) * out_strides[3]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("queries", "keys"))
def whole_kernel(
    q, q_strides, k, k_strides, v, v_strides, keep, keep_strides, out, out_strides, matrices, heads, queries, keys,
    OPERAND: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, BY: tl.constexpr,
    BLOCK: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head and BY columns of V: G, and with G still on the chip the result."""
    head = tl.program_id(0)
    columns = tl.program_id(2) * BY + tl.arange(0, BY)
    mask = mask_of(keep, keep_strides, head, heads, MASKED)
    total = gram(
        head_of(k, k_strides, head, heads), k_strides, head_of(v, v_strides, head, heads), v_strides,
        mask, keep_strides[1], tl.program_id(1), keys, columns, OPERAND, WX, WY, CX, BY, BLOCK, SIGNED, MASKED,
    )  # fmt: skip
    pointers, inside = matrix_columns(matrices + head.to(tl.int64) * (WX * WY), columns, WX, WY, CX)
    tl.store(pointers, total, mask=inside)
    apply(
        head_of(q, q_strides, head, heads), q_strides, head_of(out, out_strides, head, heads), out_strides,
        mask, keep_strides[1], tl.program_id(1), queries, columns, total, OPERAND, WX, WY, CX, BLOCK, SIGNED, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=("tokens", "chunk"))
def gram_kernel(
    code, code_strides, y, y_strides, keep, keep_strides, records, heads, tokens, chunk,
    OPERAND: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, BY: tl.constexpr,
    BLOCK: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head, chunk of tokens and BY columns of y: the chunk's part of G."""
    head, part = tl.program_id(0), tl.program_id(1)
    columns = tl.program_id(2) * BY + tl.arange(0, BY)
    begin = part * chunk
    total = gram(
        head_of(code, code_strides, head, heads), code_strides, head_of(y, y_strides, head, heads), y_strides,
        mask_of(keep, keep_strides, head, heads, MASKED), keep_strides[1], begin, tl.minimum(begin + chunk, tokens),
        columns, OPERAND, WX, WY, CX, BY, BLOCK, SIGNED, MASKED,
    )  # fmt: skip
    record = records + (head.to(tl.int64) * tl.num_programs(1) + part) * (WX * WY)
    pointers, inside = matrix_columns(record, columns, WX, WY, CX)
    tl.store(pointers, total, mask=inside)


@triton.jit(do_not_specialize=("chunks",))
def join_kernel(records, matrices, chunks, SIZE: tl.constexpr, ENTRIES: tl.constexpr, TOGETHER: tl.constexpr):
    """One program per head and ENTRIES of its matrix: the sum of its chunks' parts, TOGETHER at a time, in order."""
    head = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    records += head * chunks * SIZE
    total = tl.zeros((ENTRIES,), tl.float32)
    for start in range(0, chunks, TOGETHER):
        index = (start + tl.arange(0, TOGETHER))[:, None]
        there = (index < chunks) & (entry < SIZE)[None, :]
        total += tl.sum(tl.load(records + index * SIZE + entry[None, :], mask=there, other=0.0), 0)
    tl.store(matrices + head * SIZE + entry, total, mask=entry < SIZE)


@triton.jit(do_not_specialize=("tokens", "chunk"))
def apply_kernel(
    code, code_strides, matrices, keep, keep_strides, out, out_strides, heads, tokens, chunk,
    OPERAND: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, BY: tl.constexpr,
    BLOCK: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head, chunk of tokens and BY columns: their results."""
    head = tl.program_id(0)
    columns = tl.program_id(2) * BY + tl.arange(0, BY)
    begin = tl.program_id(1) * chunk
    pointers, inside = matrix_columns(matrices + head.to(tl.int64) * (WX * WY), columns, WX, WY, CX)
    apply(
        head_of(code, code_strides, head, heads), code_strides, head_of(out, out_strides, head, heads), out_strides,
        mask_of(keep, keep_strides, head, heads, MASKED), keep_strides[1], begin, tl.minimum(begin + chunk, tokens),
        columns, tl.load(pointers, mask=inside, other=0.0), OPERAND, WX, WY, CX, BLOCK, SIGNED, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=("tokens",))
def pack_kernel(
    x, x_strides, threshold, threshold_strides, out, out_strides, heads, tokens,
    W: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per head and BLOCK tokens: the bits of x > threshold, both read by strides (0 repeats a number)."""
    head = tl.program_id(0)
    rows, exist, _ = tokens_from(tl.program_id(1).to(tl.int64) * BLOCK, tokens, None, 0, BLOCK, False)
    numbers = load_tile(head_of(x, x_strides, head, heads), x_strides, rows, exist, W, C)
    limits = load_tile(
        head_of(threshold, threshold_strides, head, heads), threshold_strides, rows, exist, W, C
    )  # fmt: skip
    # A padded channel is 0 > 0.
    bits = tl.reshape((numbers.to(tl.float32) > limits.to(tl.float32)).to(tl.int32), (BLOCK, C // 8, 8))
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], 2)
    octets = tl.arange(0, C // 8).to(tl.int64)
    pointers = (
        head_of(out, out_strides, head, heads) + rows[:, None] * out_strides[2] + octets[None, :] * out_strides[3]
    )
    tl.store(pointers, packed.to(tl.uint8), mask=exist[:, None] & (octets * 8 < W)[None, :])
