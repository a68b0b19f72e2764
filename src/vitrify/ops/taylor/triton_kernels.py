"""The GPU kernels of Taylor attention: one launch for whole heads, or three where several programs share a head."""

# Triton's language has no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

from vitrify.ops.taylor.triton_parts import (
    count_valid,
    halves_of,
    head_of,
    mask_of,
    matrix_at,
    moments,
    pivot_of,
    row_at,
    stream,
)


@triton.jit(do_not_specialize=("queries", "keys"))
def forward_kernel(
    q, q_strides, k, k_strides, v, v_strides, keep, keep_strides, out, out_strides, M, kbar, vbar,
    scale, heads, queries, keys,
    WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head: M, kbar and vbar, and with M still on the chip Z = vbar + Q M."""
    head = tl.program_id(0)
    wide = head.to(tl.int64)
    mask = mask_of(keep, keep_strides, head, heads, MASKED)
    gram, k_mean, v_mean, count = moments(
        head_of(k, k_strides, head, heads), k_strides, head_of(v, v_strides, head, heads), v_strides,
        mask, keep_strides[1], tl.program_id(1), keys, WX, WY, CX, CY, BLOCK, True, MASKED,
    )  # fmt: skip
    matrix = gram * (scale / tl.maximum(count, 1.0))
    pointers, inside = matrix_at(M + wide * (WX * WY), WX, WY, CX, CY, False)
    tl.store(pointers, matrix, mask=inside)
    pointers, inside = row_at(kbar + wide * WX, WX, CX)
    tl.store(pointers, k_mean, mask=inside)
    pointers, inside = row_at(vbar + wide * WY, WY, CY)
    tl.store(pointers, v_mean, mask=inside)
    high, low, factor = halves_of(matrix, q.dtype.element_ty)
    stream(
        head_of(q, q_strides, head, heads), q_strides, head_of(out, out_strides, head, heads), out_strides,
        mask, keep_strides[1], 0, queries, high, low, factor, tl.zeros((CX,), tl.float32), v_mean,
        WX, WY, CX, CY, BLOCK, False, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=("queries", "keys"))
def backward_kernel(
    grad, grad_strides, q, q_strides, k, k_strides, v, v_strides, keep, keep_strides,
    dq, dq_strides, dk, dk_strides, dv, dv_strides, M, kbar, vbar, scale, heads, queries, keys,
    WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head: dM, dQ = dZ M^T, dK = (V - vbar) dM^T and dV = (K - kbar) dM + sum dZ / n."""
    head = tl.program_id(0)
    wide = head.to(tl.int64)
    begin = tl.program_id(1)
    mask = mask_of(keep, keep_strides, head, heads, MASKED)
    grad = head_of(grad, grad_strides, head, heads)
    k = head_of(k, k_strides, head, heads)
    v = head_of(v, v_strides, head, heads)
    pointers, inside = matrix_at(M + wide * (WX * WY), WY, WX, CY, CX, True)
    high, low, factor = halves_of(tl.load(pointers, mask=inside, other=0.0), grad.dtype.element_ty)
    none = tl.zeros((CX,), tl.float32)
    stream(
        grad, grad_strides, head_of(dq, dq_strides, head, heads), dq_strides,
        mask, keep_strides[1], begin, queries, high, low, factor, none, none,
        WY, WX, CY, CX, BLOCK, False, False,
    )  # fmt: skip
    gram, _, total, _ = moments(
        head_of(q, q_strides, head, heads), q_strides, grad, grad_strides,
        mask, keep_strides[1], begin, queries, WX, WY, CX, CY, BLOCK, False, False,
    )  # fmt: skip
    n = count_valid(keys, mask, keep_strides[1], MASKED)
    gram *= scale / n
    k_pivot = pivot_of(k, k_strides, mask, keep_strides[1], begin, keys, WX, CX, MASKED)
    pointers, inside = row_at(kbar + wide * WX, WX, CX)
    k_rest = tl.load(pointers, mask=inside, other=0.0) - k_pivot
    v_pivot = pivot_of(v, v_strides, mask, keep_strides[1], begin, keys, WY, CY, MASKED)
    pointers, inside = row_at(vbar + wide * WY, WY, CY)
    v_rest = tl.load(pointers, mask=inside, other=0.0) - v_pivot
    dk_bias = -tl.sum(gram * v_rest[None, :], 1)
    dv_bias = total / n - tl.sum(gram * k_rest[:, None], 0)
    high, low, factor = halves_of(gram, k.dtype.element_ty)
    stream(
        v, v_strides, head_of(dk, dk_strides, head, heads), dk_strides,
        mask, keep_strides[1], begin, keys, tl.trans(high), tl.trans(low), factor, v_pivot, dk_bias,
        WY, WX, CY, CX, BLOCK, True, MASKED,
    )  # fmt: skip
    stream(
        k, k_strides, head_of(dv, dv_strides, head, heads), dv_strides,
        mask, keep_strides[1], begin, keys, high, low, factor, k_pivot, dv_bias,
        WX, WY, CX, CY, BLOCK, True, MASKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=("tokens", "chunk"))
def reduce_kernel(
    x, x_strides, y, y_strides, keep, keep_strides, records, heads, tokens, chunk,
    SIZE: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr,
    BLOCK: tl.constexpr, CENTRED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head and chunk of tokens: its record of SIZE numbers (gram, xbar, ybar, count)."""
    head = tl.program_id(0)
    begin = tl.program_id(1) * chunk
    gram, x_mean, y_mean, count = moments(
        head_of(x, x_strides, head, heads), x_strides, head_of(y, y_strides, head, heads), y_strides,
        mask_of(keep, keep_strides, head, heads, MASKED), keep_strides[1], begin, tl.minimum(begin + chunk, tokens),
        WX, WY, CX, CY, BLOCK, CENTRED, MASKED,
    )  # fmt: skip
    record = records + (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * SIZE
    pointers, inside = matrix_at(record, WX, WY, CX, CY, False)
    tl.store(pointers, gram, mask=inside)
    pointers, inside = row_at(record + WX * WY, WX, CX)
    tl.store(pointers, x_mean, mask=inside)
    pointers, inside = row_at(record + WX * WY + WX, WY, CY)
    tl.store(pointers, y_mean, mask=inside)
    tl.store(record + WX * WY + WX + WY, count)


@triton.jit(do_not_specialize=("keys", "chunks"))
def combine_kernel(
    records, keep, keep_strides, matrices, x_bar, y_bar, scale, heads, keys, chunks,
    SIZE: tl.constexpr, WX: tl.constexpr, WY: tl.constexpr, ENTRIES: tl.constexpr, TOGETHER: tl.constexpr,
    CENTRED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head and ENTRIES of its matrix: join the records of all chunks, TOGETHER at a time, in order.

    CENTRED: means are joined by their counts and grams by Chan's formula, so that no large numbers cancel; n is the
    count. Else y_bar is the sum over n, the number of valid keys.
    """
    head = tl.program_id(0)
    wide = head.to(tl.int64)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entry < WX * WY
    row, column = entry // WY, entry % WY
    x_at, y_at, count_at = WX * WY + row, WX * WY + WX + column, WX * WY + WX + WY
    records += wide * chunks * SIZE
    x_first = tl.load(records + x_at, mask=inside, other=0.0)
    y_first = tl.load(records + y_at, mask=inside, other=0.0)
    x_mean = tl.zeros((ENTRIES,), tl.float32)
    y_mean = tl.zeros((ENTRIES,), tl.float32)
    count = tl.zeros((TOGETHER,), tl.float32)
    if CENTRED:
        for start in range(0, chunks, TOGETHER):
            index = start + tl.arange(0, TOGETHER)
            record = records + (index * SIZE)[:, None]
            there = (index < chunks)[:, None] & inside[None, :]
            weight = tl.load(records + index * SIZE + count_at, mask=index < chunks, other=0.0)
            x = tl.load(record + x_at[None, :], mask=there, other=0.0) - x_first[None, :]
            y = tl.load(record + y_at[None, :], mask=there, other=0.0) - y_first[None, :]
            x_mean += tl.sum(weight[:, None] * x, 0)
            y_mean += tl.sum(weight[:, None] * y, 0)
            count += weight
        n = tl.maximum(tl.sum(count, 0), 1.0)
        x_mean = x_first + x_mean / n
        y_mean = y_first + y_mean / n
    else:
        n = count_valid(keys, mask_of(keep, keep_strides, head, heads, MASKED), keep_strides[1], MASKED)
    total = tl.zeros((ENTRIES,), tl.float32)
    for start in range(0, chunks, TOGETHER):
        index = start + tl.arange(0, TOGETHER)
        record = records + (index * SIZE)[:, None]
        there = (index < chunks)[:, None] & inside[None, :]
        gram = tl.load(record + entry[None, :], mask=there, other=0.0)
        y = tl.load(record + y_at[None, :], mask=there, other=0.0)
        if CENTRED:
            weight = tl.load(records + index * SIZE + count_at, mask=index < chunks, other=0.0)
            x = tl.load(record + x_at[None, :], mask=there, other=0.0)
            gram += weight[:, None] * (x - x_mean[None, :]) * (y - y_mean[None, :])
        else:
            y_mean += tl.sum(y, 0) / n
        total += tl.sum(gram, 0)
    tl.store(matrices + wide * (WX * WY) + entry, total * (scale / n), mask=inside)
    tl.store(y_bar + wide * WY + column, y_mean, mask=inside & (row == 0))
    if CENTRED:
        tl.store(x_bar + wide * WX + row, x_mean, mask=inside & (column == 0))


@triton.jit(do_not_specialize=("tokens", "chunk"))
def stream_kernel(
    x, x_strides, matrices, offset, bias, keep, keep_strides, out, out_strides, heads, tokens, chunk,
    WX: tl.constexpr, WY: tl.constexpr, CX: tl.constexpr, CY: tl.constexpr, BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One program per head and chunk of tokens: out = bias + (x - offset) @ matrix, as it lies or TRANSPOSED.

    x loses a pivot, which costs no digits, and the rest of the offset goes into the bias.
    """
    head = tl.program_id(0)
    wide = head.to(tl.int64)
    begin = tl.program_id(1) * chunk
    end = tl.minimum(begin + chunk, tokens)
    mask = mask_of(keep, keep_strides, head, heads, MASKED)
    x = head_of(x, x_strides, head, heads)
    pointers, inside = matrix_at(matrices + wide * (WX * WY), WX, WY, CX, CY, TRANSPOSED)
    matrix = tl.load(pointers, mask=inside, other=0.0)
    pivot = tl.zeros((CX,), tl.float32)
    row = tl.zeros((CY,), tl.float32)
    if BIASED:
        pointers, inside = row_at(bias + wide * WY, WY, CY)
        row = tl.load(pointers, mask=inside, other=0.0)
    if SHIFTED:
        pivot = pivot_of(x, x_strides, mask, keep_strides[1], begin, end, WX, CX, MASKED)
        pointers, inside = row_at(offset + wide * WX, WX, CX)
        rest = tl.load(pointers, mask=inside, other=0.0) - pivot
        row -= tl.sum(matrix * rest[:, None], 0)
    high, low, factor = halves_of(matrix, x.dtype.element_ty)
    stream(
        x, x_strides, head_of(out, out_strides, head, heads), out_strides,
        mask, keep_strides[1], begin, end, high, low, factor, pivot, row,
        WX, WY, CX, CY, BLOCK, SHIFTED, MASKED,
    )  # fmt: skip
