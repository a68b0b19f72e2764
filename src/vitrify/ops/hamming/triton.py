"""Hamming attention on the GPU, in the linear order: which kernels run, on how many programs.

Codes come as bits, as int8 or bool, or as numbers; all are read through their strides, and decoded in registers.
Results have memory order (B, N, H, Dv). How heads are shared between programs is Taylor attention's plan: it follows
from the shapes and the number of processors, so that the same call gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitrify.ops import gpu
from vitrify.ops.hamming import aten, bits
from vitrify.ops.hamming.aten import Code
from vitrify.ops.hamming.triton_kernels import apply_kernel, gram_kernel, join_kernel, pack_kernel, whole_kernel
from vitrify.ops.launch import Plan, mask_arguments, plan, processors, strided
from vitrify.ops.taylor.cpu import tokens_first
from vitrify.ops.taylor.triton import holds, stream

# The widest codes and values: wider ones would not fit a program's registers.
MAX_WIDTH = 128
# Columns of V per program.
COLUMNS = 64
# Tokens per program that packs.
PACKED = 64
# Entries of a matrix per program, and records per step, when the parts of a head are joined.
ENTRIES, TOGETHER = 256, 8
# The format that carries codes and the parts of float32 numbers. The interpreter's tl.dot does not know bfloat16; in
# float16 such parts end at 65,504.
OPERAND = tl.float16 if gpu.interpreting() else tl.bfloat16


def fits(value: Tensor, queries: int, code: Code) -> bool:
    """Say whether the kernels take these inputs: no float64, nothing wider than MAX_WIDTH, nothing empty."""
    widths = (code.dim, value.shape[3])
    return value.dtype != torch.float64 and max(widths) <= MAX_WIDTH and value.numel() > 0 and queries > 0


def forward(
    query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, code: Code, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """C_q G as (B, H, Nq, Dv) in `out_dtype`, and G = C_k^T V as (B, H, D, Dv) in float32 for `backward`.

    What does not fit goes to `aten`, here and in `backward`.
    """
    queries = query_code.shape[2]
    if not fits(value, queries, code):
        return aten.forward(query_code, key_code, value, keep, code, out_dtype)
    out = tokens_first(value, queries, value.shape[3], out_dtype)
    heads, keys = value.shape[1], value.shape[2]
    shared = plan(value.shape[0] * heads, queries, keys, processors(value.device))
    if shared is not None:
        matrices = _gram(key_code, value, keep, code, shared)
        _apply(query_code, matrices, None, code, shared, out)
        return out, matrices
    matrices = _empty_matrices(value, code)
    tensors = (*strided(_bytes(query_code), _bytes(key_code), value), *mask_arguments(keep), *strided(out))
    _launch(whole_kernel, value, code, 1, *tensors, matrices, heads, queries, keys, MASKED=keep is not None)
    return out, matrices


def backward(
    grad: Tensor, query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, matrices: Tensor, code: Code
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query_code, key_code and value, each (B, H, N, width) in memory order (B, N, H, width).

    Those of codes that are no floating numbers are empty.
    """
    queries, keys = query_code.shape[2], key_code.shape[2]
    if grad.dtype == torch.float64:
        grad = grad.float()  # the kernels multiply no float64, and what the forward rounded from was float32
    streamed = [x for x, c in ((grad, query_code), (value, key_code)) if c.is_floating_point()]
    if not fits(value, queries, code) or not all(holds(max(code.dim, value.shape[3]), x) for x in streamed):
        return aten.backward(grad, query_code, key_code, value, keep, matrices, code)
    shared = plan(value.shape[0] * value.shape[1], queries, keys, processors(value.device), divide=True)
    assert shared is not None
    d_matrices = _gram(query_code, grad, None, code, shared)
    d_query, d_key = (aten.empty_gradient(c) for c in (query_code, key_code))
    d_value = tokens_first(value, keys, value.shape[3])
    _apply(key_code, d_matrices, keep, code, shared, d_value)
    if query_code.is_floating_point():
        stream(grad, matrices.contiguous(), None, None, None, d_query, shared.stream, transposed=True)
    if key_code.is_floating_point():
        stream(value, d_matrices, None, None, keep, d_key, shared.stream, transposed=True)
    return d_query, d_key, d_value


def threshold_bits(x: Tensor, threshold: Tensor) -> Tensor:
    """Return the bits of x > threshold, uint8 (B, H, N, ceil(D / 8)): one pass over x, read by its strides.

    x (B, H, N, D), `threshold` of a shape that broadcasts to it. A head's bits lie together, as attention reads them.
    """
    batch, heads, tokens, width = x.shape
    if torch.float64 in (x.dtype, threshold.dtype) or width > MAX_WIDTH or x.numel() == 0:
        return bits.threshold_bits(x, threshold)
    out = x.new_empty(batch, heads, tokens, bits.words(width), dtype=torch.uint8)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        pack_kernel[batch * heads, triton.cdiv(tokens, PACKED)](
            *strided(x, threshold.expand_as(x), out), heads, tokens, W=width, C=_padded(width), BLOCK=PACKED,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_code: Tensor, key_code: Tensor, value: Tensor, *rest: Any) -> Tensor:
        keep, ctx.code, out_dtype = rest
        out, matrices = forward(query_code, key_code, value, keep, ctx.code, out_dtype)
        ctx.save_for_backward(query_code, key_code, value, keep, matrices)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query_code, key_code, value, keep, matrices = ctx.saved_tensors
        grads = backward(grad, query_code, key_code, value, keep, matrices, ctx.code)
        return *(g if g.numel() else None for g in grads), None, None, None


def interpreted(
    query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, code: Code, out_dtype: torch.dtype
) -> Tensor:
    """Run the kernels and their backward on tensors that the registered op sends elsewhere: the interpreter's way."""
    out: Tensor = _Attention.apply(query_code, key_code, value, keep, code, out_dtype)
    return out


def _gram(code_of: Tensor, y: Tensor, keep: Tensor | None, code: Code, shared: Plan) -> Tensor:
    """Return sum_t c_t^T y_t of every head: a record per chunk of tokens, then all of them joined."""
    heads, tokens, size = y.shape[1], y.shape[2], code.dim * y.shape[3]
    matrices, chunks = _empty_matrices(y, code), triton.cdiv(tokens, shared.reduce)
    records = matrices if chunks == 1 else matrices.new_empty(y.shape[0] * heads * chunks * size)
    tensors = (*strided(_bytes(code_of), y), *mask_arguments(keep), records)
    _launch(gram_kernel, y, code, chunks, *tensors, heads, tokens, shared.reduce, MASKED=keep is not None)
    if chunks > 1:
        with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
            join_kernel[y.shape[0] * heads, triton.cdiv(size, ENTRIES)](
                records, matrices, chunks, SIZE=size, ENTRIES=ENTRIES, TOGETHER=TOGETHER, enable_fp_fusion=True
            )
    return matrices


def _apply(code_of: Tensor, matrices: Tensor, keep: Tensor | None, code: Code, shared: Plan, out: Tensor) -> None:
    """Out = codes @ matrices, for every head and chunk of tokens; 0 where `keep` says padding."""
    tokens = out.shape[2]
    tensors = (*strided(_bytes(code_of)), matrices, *mask_arguments(keep), *strided(out))
    chunks = triton.cdiv(tokens, shared.stream)
    _launch(apply_kernel, out, code, chunks, *tensors, out.shape[1], tokens, shared.stream, MASKED=keep is not None)


def _launch(kernel: Any, like: Tensor, code: Code, chunks: int, *arguments: Any, MASKED: bool) -> None:
    """Run `kernel` with one program per head of `like`, chunk and COLUMNS of its columns."""
    width = like.shape[3]
    padded, columns = _padded(code.dim), min(COLUMNS, _padded(width))
    # What each shape takes is in benchmarks/compile_report.md.
    single = like.dtype == torch.float32
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        kernel[like.shape[0] * like.shape[1], chunks, triton.cdiv(width, columns)](
            *arguments, OPERAND=OPERAND, WX=code.dim, WY=width, CX=padded, BY=columns, BLOCK=32 if single else 64,
            SIGNED=code.signed, MASKED=MASKED, num_warps=8 if single or padded > COLUMNS else 4, num_stages=2,
            enable_fp_fusion=True,
        )  # fmt: skip


def _padded(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _bytes(code_of: Tensor) -> Tensor:
    """Return codes as the kernels take them: uint8 means bits there, and bool is not known."""
    return code_of.view(torch.int8) if code_of.dtype == torch.bool else code_of


def _empty_matrices(y: Tensor, code: Code) -> Tensor:
    return y.new_empty(*y.shape[:2], code.dim, y.shape[3], dtype=torch.float32)
