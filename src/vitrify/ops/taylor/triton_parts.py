"""What the GPU kernels of Taylor attention are made of, in Triton: a reduction over tokens, and a pass over tokens.

    reduction   gram = sum_t (x_t - xbar)^T (y_t - ybar), xbar, ybar     M of the forward pass, dM of the backward
    streaming   out_t = bias + (x_t - offset) @ matrix                   Z, dQ, dK and dV

Tensors are (tokens, width), one head of (B, H, N, width) read through its four strides; token numbers are 64-bit, so
that no offset overflows. Masks are uint8, 0 = padded. A width W is padded to a power of two C. TRITON.md says what is
exact.
"""

# Triton's language has no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_of(base, strides, head, heads):
    """Return the start of one head of a (B, H, N, width) tensor."""
    return base + (head // heads).to(tl.int64) * strides[0] + (head % heads).to(tl.int64) * strides[1]


@triton.jit
def mask_of(keep, strides, head, heads, MASKED: tl.constexpr):
    """Return the start of one image's mask; a number that nobody reads if there is none: Triton 3.6 returns no None."""
    start = head
    if MASKED:
        start = keep + (head // heads).to(tl.int64) * strides[0]
    return start


@triton.jit
def row_at(base, W: tl.constexpr, C: tl.constexpr):
    """Return pointers to a row of W numbers, and which of its C places hold one."""
    columns = tl.arange(0, C)
    return base + columns, columns < W


@triton.jit
def matrix_at(base, WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return pointers to a (WX, WY) matrix, stored so or transposed, and which of its (CX, CY) places hold a number."""
    rows, columns = tl.arange(0, CX)[:, None], tl.arange(0, CY)[None, :]
    place = rows + columns * WX if TRANSPOSED else rows * WY + columns
    return base + place, (rows < WX) & (columns < WY)


@triton.jit
def tokens_from(start, end, keep, keep_stride, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Return the numbers of the tokens from `start` on, which of them exist, and which of those are no padding."""
    tokens = start + tl.arange(0, BLOCK).to(tl.int64)
    exist = tokens < end
    valid = exist
    if MASKED:
        valid = tl.load(keep + tokens * keep_stride, mask=exist, other=0) != 0
    return tokens, exist, valid


@triton.jit
def load_tile(base, strides, tokens, valid, W: tl.constexpr, C: tl.constexpr):
    """Load (len(tokens), C) numbers, 0 where a token is not valid or a column is padding: NaN there stays there."""
    columns = tl.arange(0, C).to(tl.int64)
    inside = valid[:, None]
    if W < C:
        inside = inside & (columns < W)[None, :]
    return tl.load(base + tokens[:, None] * strides[2] + columns[None, :] * strides[3], mask=inside, other=0.0)


@triton.jit
def count_valid(end, keep, keep_stride, MASKED: tl.constexpr):
    """Return the number of valid tokens before `end` as float32, at least 1."""
    if MASKED:
        found = tl.zeros((1024,), tl.int32)
        for start in range(0, end, 1024):
            _, _, valid = tokens_from(start, end, keep, keep_stride, 1024, True)
            found += valid.to(tl.int32)
        count = tl.maximum(tl.sum(found, 0), 1).to(tl.float32)
    else:
        count = end.to(tl.float32)
    return count


@triton.jit
def pivot_of(
    base, strides, keep, keep_stride, begin, end,
    W: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return what to subtract from every token before a product: close to the mean, and exact to subtract.

    The mean of 32 tokens from all over the sequence: the first ones may be class tokens, or all sky. For 16-bit inputs
    it is rounded to their format, and taken only for channels in which those tokens lie within half of it: differences
    are exact there (Sterbenz), so that the tensor cores' 16-bit operands hold them. Where the mean is smaller, raw
    products cost float32 sums next to nothing.
    """
    tokens = begin + tl.arange(0, 32).to(tl.int64) * tl.maximum((end - begin) // 32, 1)
    valid = tokens < end
    if MASKED:
        valid = tl.load(keep + tokens * keep_stride, mask=valid, other=0) != 0
    x = load_tile(base, strides, tokens, valid, W, C)
    wide = x.to(tl.float32)
    count = tl.maximum(tl.sum(valid.to(tl.float32), 0), 1.0)
    pivot = tl.sum(wide, 0) / count
    if x.dtype != tl.float32:
        pivot = pivot.to(x.dtype).to(tl.float32)
        farthest = tl.max(tl.where(valid[:, None], tl.abs(wide - pivot[None, :]), 0.0), 0)
        pivot = tl.where(2 * farthest <= tl.abs(pivot), pivot, 0.0)
    return pivot


@triton.jit
def add_rows(total, tile, BLOCK: tl.constexpr, C: tl.constexpr):
    """Add a (BLOCK, C) tile to a (16, C) total: rows 16 apart lie in one thread, so that this needs no exchange."""
    return total + tl.sum(tl.reshape(tile, (BLOCK // 16, 16, C)), 0)


@triton.jit
def moments(
    x, x_strides, y, y_strides, keep, keep_stride, begin, end,
    WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Reduce the tokens from `begin` to `end`: return gram, xbar, ybar and the count of valid tokens, in float32.

    CENTRED: gram and means as the module's docstring has them. Else gram = sum x^T y, xbar = 0 and ybar = sum y.
    """
    gram = tl.zeros((CX, CY), tl.float32)
    x_rows = tl.zeros((16, CX), tl.float32)
    y_rows = tl.zeros((16, CY), tl.float32)
    found = tl.zeros((BLOCK,), tl.int32)
    if CENTRED:
        x_pivot = pivot_of(x, x_strides, keep, keep_stride, begin, end, WX, CX, MASKED)
        y_pivot = pivot_of(y, y_strides, keep, keep_stride, begin, end, WY, CY, MASKED)
    for start in range(begin, end, BLOCK):
        tokens, _, valid = tokens_from(start, end, keep, keep_stride, BLOCK, MASKED)
        a = load_tile(x, x_strides, tokens, valid, WX, CX)
        b = load_tile(y, y_strides, tokens, valid, WY, CY)
        if CENTRED:
            wide = tl.where(valid[:, None], a.to(tl.float32) - x_pivot[None, :], 0.0)
            x_rows = add_rows(x_rows, wide, BLOCK, CX)
            a = wide.to(a.dtype)
            wide = tl.where(valid[:, None], b.to(tl.float32) - y_pivot[None, :], 0.0)
            y_rows = add_rows(y_rows, wide, BLOCK, CY)
            b = wide.to(b.dtype)
        else:
            y_rows = add_rows(y_rows, b.to(tl.float32), BLOCK, CY)
        if MASKED:
            found += valid.to(tl.int32)
        gram = tl.dot(tl.trans(a), b, gram, input_precision="tf32x3")
    count = (tl.sum(found, 0) if MASKED else end - begin).to(tl.float32)
    x_mean = tl.sum(x_rows, 0)
    y_mean = tl.sum(y_rows, 0)
    if CENTRED:
        n = tl.maximum(count, 1.0)
        gram -= (x_mean / n)[:, None] * y_mean[None, :]
        x_mean = x_pivot + x_mean / n
        y_mean = y_pivot + y_mean / n
    return gram, x_mean, y_mean, count


@triton.jit
def halves_of(matrix, dtype: tl.constexpr):
    """Split a float32 matrix in two of `dtype` that together keep twice its digits; return also their common factor.

    The factor, a power of two, puts the largest entry where float16 has room on both sides.
    """
    if dtype == tl.float32:
        high, low, factor = matrix, matrix, 1.0
    else:
        # Of all entries at once: for sm_100, Triton 3.6 fails at a maximum over one axis that is reduced further.
        largest = tl.max(tl.abs(matrix))
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        factor = tl.maximum(power, 1e-30) * (1 / 16384)
        scaled = matrix * (1 / factor)
        high = scaled.to(dtype)
        low = (scaled - high.to(tl.float32)).to(dtype)
    return high, low, factor


@triton.jit
def stream(
    x, x_strides, out, out_strides, keep, keep_stride, begin, end, high, low, factor, pivot, bias,
    WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr,
    BLOCK: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write bias + factor (x - pivot) @ (high + low) for the tokens from `begin` to `end`, and 0 for padding.

    `pivot` is 0 unless SHIFTED. Sums are float32, and rounded once, at the end.
    """
    columns = tl.arange(0, CY).to(tl.int64)
    for start in range(begin, end, BLOCK):
        tokens, exist, valid = tokens_from(start, end, keep, keep_stride, BLOCK, MASKED)
        a = load_tile(x, x_strides, tokens, valid, WX, CX)
        if SHIFTED:
            a = (a.to(tl.float32) - pivot[None, :]).to(a.dtype)
        result = tl.dot(a, high, input_precision="tf32x3")
        if a.dtype != tl.float32:
            result = tl.dot(a, low, result)
        result = result * factor + bias[None, :]
        inside = exist[:, None]
        if MASKED:
            result = tl.where(valid[:, None], result, 0.0)
        if WY < CY:
            inside = inside & (columns < WY)[None, :]
        pointers = out + tokens[:, None] * out_strides[2] + columns[None, :] * out_strides[3]
        tl.store(pointers, result.to(out.dtype.element_ty), mask=inside)
