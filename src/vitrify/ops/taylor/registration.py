"""The custom op `vitrify::taylor_attention` and its backward: kernels, shapes for fake tensors, autograd.

The op also returns what its backward needs (M, kbar, vbar: D x Dv numbers per head instead of the inputs' products).
The backward is an op of its own, without a derivative: asking for second derivatives is an error, not a wrong number.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from vitrify.ops.taylor import aten, cpu
from vitrify.ops.taylor.reference import AffineState


@torch.library.custom_op("vitrify::taylor_attention", mutates_args=())
def taylor_attention_op(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(B, H, Nq, D), (B, H, Nk, D), (B, H, Nk, Dv), keep bool (B, Nk) -> out (B, H, Nq, Dv), M, kbar, vbar.

    `out` is a transposed view of (B, Nq, H, Dv), so that merging the heads copies nothing.
    """
    with without_autocast(query):
        out, state = aten.forward(query, key, value, keep, scale)
    return merge_order(out), *state


@taylor_attention_op.register_kernel("cpu")
def _(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(query):
        out, state = cpu.forward(query, key, value, keep, scale)
    return out, *state


@taylor_attention_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, queries, dim = query.shape
    value_dim = value.shape[3]
    dtype = aten.accumulate_dtype(query.dtype)
    return (
        cpu.tokens_first(query, batch, queries, heads, value_dim),
        query.new_empty(batch, heads, dim, value_dim, dtype=dtype),
        query.new_empty(batch, heads, 1, dim, dtype=dtype),
        query.new_empty(batch, heads, 1, value_dim, dtype=dtype),
    )


@torch.library.custom_op("vitrify::taylor_attention_backward", mutates_args=())
def taylor_attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    M: Tensor,
    kbar: Tensor,
    vbar: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `out` with respect to query, key and value, each a transposed view of (B, N, H, D)."""
    with without_autocast(query):
        grads = aten.backward(grad, query, key, value, keep, scale, AffineState(M, kbar, vbar))
    d_query, d_key, d_value = map(merge_order, grads)
    return d_query, d_key, d_value


@taylor_attention_backward_op.register_kernel("cpu")
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    M: Tensor,
    kbar: Tensor,
    vbar: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(query):
        return cpu.backward(grad, query, key, value, keep, scale, AffineState(M, kbar, vbar))


@taylor_attention_backward_op.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    M: Tensor,
    kbar: Tensor,
    vbar: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (
        cpu.tokens_first(t, t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in (query, key, value)
    )
    return d_query, d_key, d_value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, keep, scale = inputs
    _, M, kbar, vbar = output
    ctx.save_for_backward(query, key, value, keep, M, kbar, vbar)
    ctx.scale = scale
    ctx.mark_non_differentiable(M, kbar, vbar)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None, None]:
    query, key, value, keep, M, kbar, vbar = ctx.saved_tensors
    grads = taylor_attention_backward_op(grad, query, key, value, keep, ctx.scale, M, kbar, vbar)
    return *grads, None, None


taylor_attention_op.register_autograd(_backward, setup_context=_setup_context)


def merge_order(x: Tensor) -> Tensor:
    """Return (B, H, N, D) in memory order (B, N, H, D), so that merging the heads copies nothing."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast leaves float32 sums alone; costs nothing where autocast is off."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()
