"""Taylor attention on the GPU: which kernels run, on how many programs. TRITON.md has the design and what is exact.

Inputs are read through their strides (a packed qkv projection needs no copy); results have memory order (B, N, H, D).
Nothing is tuned at run time: the plan follows from the shapes and the number of processors, so that the same call
gives the same bits, and sequence lengths share their compiled kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitrify.ops.launch import mask_arguments, plan, processors, shared_memory, strided
from vitrify.ops.taylor import aten
from vitrify.ops.taylor.cpu import tokens_first
from vitrify.ops.taylor.reference import AffineState
from vitrify.ops.taylor.triton_kernels import (
    backward_kernel,
    combine_kernel,
    forward_kernel,
    reduce_kernel,
    stream_kernel,
)

# The widest head whose matrix a program can hold in its registers, and the widest that leaves room beside it.
MAX_WIDTH, NARROW = 128, 64
# Bytes of shared memory that a matrix wider than NARROW takes with float32 inputs: twice, for three-fold TF32. GPUs of
# compute capability 8.6, 8.9 and 12.0 do not have them.
WIDE_FLOAT32 = 160_000
# Entries of a matrix per program, and records per step, when the parts of a head are joined.
ENTRIES, TOGETHER = 256, 8


def fits(query: Tensor, value: Tensor) -> bool:
    """Say whether the kernels take these inputs: no float64, nothing empty, no head wider than a program can hold."""
    width = max(query.shape[3], value.shape[3])
    return query.dtype != torch.float64 and query.numel() > 0 and value.numel() > 0 and holds(width, query)


def holds(width: int, x: Tensor) -> bool:
    """Say whether a program can hold a matrix of `width` to multiply x, of its dtype and on its device, with it."""
    large = x.dtype == torch.float32 and width > NARROW
    return width <= MAX_WIDTH and not (large and shared_memory(x.device) < WIDE_FLOAT32)


def forward(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, AffineState]:
    """Z = vbar + Q M as (B, H, Nq, Dv) in memory order (B, Nq, H, Dv), and the state for `backward`, in float32.

    What does not fit, float64 and heads wider than 128 among it, goes to `aten`, here and in `backward`.
    """
    out = tokens_first(query, query.shape[2], value.shape[3])
    if not fits(query, value):
        plain, state = aten.forward(query, key, value, keep, scale)
        return out.copy_(plain), state
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    state = _empty_state(query, value)
    shared = plan(query.shape[0] * heads, queries, keys, processors(query.device))
    if shared is None:
        tensors = (*strided(query, key, value), *mask_arguments(keep), *strided(out), *state)
        _launch(forward_kernel, query, value, 1, *tensors, scale, heads, queries, keys, MASKED=keep is not None)
    else:
        _reduce(key, value, keep, state, scale, keys, shared.reduce, centred=True)
        stream(query, state.M, None, state.vbar, None, out, shared.stream, transposed=False)
    return out, state


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, state: AffineState
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed-form gradients (dQ, dK, dV), each (B, H, N, D) in memory order (B, N, H, D)."""
    if not fits(query, value):
        return aten.backward(grad, query, key, value, keep, scale, state)
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    d_query, d_key, d_value = (tokens_first(t, t.shape[2], t.shape[3]) for t in (query, key, value))
    state = AffineState(*(t.contiguous() for t in state))
    # All three gradients of a wide head in one kernel would not fit its registers.
    wide = max(query.shape[3], value.shape[3]) > NARROW
    shared = plan(query.shape[0] * heads, queries, keys, processors(query.device), divide=wide)
    if shared is None:
        tensors = (*strided(grad, query, key, value), *mask_arguments(keep), *strided(d_query, d_key, d_value), *state)
        _launch(backward_kernel, query, value, 1, *tensors, scale, heads, queries, keys, MASKED=keep is not None)
    else:
        # Nothing is centred here: the place of kbar stays empty, and that of vbar takes sum dZ / n.
        d_state = _empty_state(query, value)
        _reduce(query, grad, keep, d_state, scale, keys, shared.reduce, centred=False)
        stream(grad, state.M, None, None, None, d_query, shared.stream, transposed=True)
        stream(value, d_state.M, state.vbar, None, keep, d_key, shared.stream, transposed=True)
        stream(key, d_state.M, state.kbar, d_state.vbar, keep, d_value, shared.stream, transposed=False)
    return d_query, d_key, d_value


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        out, state = forward(query, key, value, keep, scale)
        ctx.save_for_backward(query, key, value, keep, *state)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, keep, *state = ctx.saved_tensors
        return *backward(grad, query, key, value, keep, ctx.scale, AffineState(*state)), None, None


def interpreted(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Run the kernels and their backward on tensors that the registered op sends elsewhere: the interpreter's way."""
    out: Tensor = _Attention.apply(query, key, value, keep, scale)
    return out


def _reduce(
    x: Tensor, y: Tensor, keep: Tensor | None, state: AffineState, scale: float, keys: int, chunk: int, *, centred: bool
) -> None:
    """Fill `state` from the tokens of x and y in two launches: a record per chunk of tokens, then all of them joined.

    Centred, the tokens are the keys that `keep` speaks of; else queries, of which none is padding.
    """
    heads, tokens, width, other = x.shape[1], x.shape[2], x.shape[3], y.shape[3]
    chunks = triton.cdiv(tokens, chunk)
    size = triton.cdiv(width * other + width + other + 1, 4) * 4  # records begin where 16-byte stores can
    records = x.new_empty(x.shape[0] * heads * chunks * size, dtype=torch.float32)
    hidden = keep if centred else None
    tensors = (*strided(x, y), *mask_arguments(hidden), records)
    flags = {"SIZE": size, "CENTRED": centred, "MASKED": hidden is not None}
    _launch(reduce_kernel, x, y, chunks, *tensors, heads, tokens, chunk, **flags)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        combine_kernel[x.shape[0] * heads, triton.cdiv(width * other, ENTRIES)](
            *(records, *mask_arguments(keep), *state, scale, heads, keys, chunks),
            SIZE=size, WX=width, WY=other, ENTRIES=ENTRIES, TOGETHER=TOGETHER, CENTRED=centred, MASKED=keep is not None,
            enable_fp_fusion=True,
        )  # fmt: skip


def stream(
    x: Tensor,
    matrices: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    keep: Tensor | None,
    out: Tensor,
    chunk: int,
    *,
    transposed: bool,
) -> None:
    """Out = bias + (x - offset) matrix, for every head and chunk of tokens; 0 where `keep` says padding."""
    heads, tokens = x.shape[1], x.shape[2]
    tensors = (*strided(x), matrices, offset, bias, *mask_arguments(keep), *strided(out))
    flags = {"TRANSPOSED": transposed, "SHIFTED": offset is not None, "BIASED": bias is not None}
    chunks = triton.cdiv(tokens, chunk)
    _launch(stream_kernel, x, out, chunks, *tensors, heads, tokens, chunk, **flags, MASKED=keep is not None)


def _launch(kernel: Any, x: Tensor, y: Tensor, chunks: int, *arguments: Any, **constants: int) -> None:
    """Run `kernel` with one program per head and chunk, on a tile shape that follows from the widths of x and y."""
    columns = [max(16, triton.next_power_of_2(t.shape[3])) for t in (x, y)]
    wide, single = max(columns) > NARROW, x.dtype == torch.float32
    # What each shape takes is in benchmarks/compile_report.md.
    block = (16 if wide else 32) if single else 128 if max(columns) <= NARROW // 2 else 64
    stages = 2 if wide and (single or kernel is not reduce_kernel) else 3
    warps = 8 if wide or single or (kernel is backward_kernel and max(columns) == NARROW) else 4
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[x.shape[0] * x.shape[1], chunks](
            *arguments, WX=x.shape[3], WY=y.shape[3], CX=columns[0], CY=columns[1], BLOCK=block,
            **constants, num_warps=warps, num_stages=stages,
            enable_fp_fusion=True,
        )  # fmt: skip


def _empty_state(query: Tensor, value: Tensor) -> AffineState:
    """Return M (B, H, D, Dv), kbar (B, H, 1, D) and vbar (B, H, 1, Dv), not yet written."""
    batch, heads, _, width = query.shape
    sizes = ((width, value.shape[3]), (1, width), (1, value.shape[3]))
    return AffineState(*(query.new_empty(batch, heads, *size, dtype=torch.float32) for size in sizes))
