"""The registered op `vitrify::taylor_attention` and its backward: kernels, shapes for fake tensors, autograd.

The op also returns what its backward needs (M, kbar, vbar: D x Dv numbers per head, not the n x n of softmax).
The backward is an op of its own, without a derivative: asking for second derivatives is an error, not a wrong number.
`define` and `impl` instead of `custom_op`: 25 us less per call, where DeiT-Tiny's attention takes 300.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitrify.errors import UnsupportedError
from vitrify.ops import gpu
from vitrify.ops.autocast import without_autocast
from vitrify.ops.taylor import aten, cpu
from vitrify.ops.taylor.reference import AffineState

FORWARD = "vitrify::taylor_attention"
BACKWARD = "vitrify::taylor_attention_backward"

# keep: bool (B, Nk). The first result is in memory order (B, Nq, H, Dv): merging the heads copies nothing.
torch.library.define(
    FORWARD,
    "(Tensor query, Tensor key, Tensor value, Tensor? keep, float scale)"
    " -> (Tensor out, Tensor M, Tensor kbar, Tensor vbar)",
)
# Gradients with respect to query, key and value, each in memory order (B, N, H, D).
torch.library.define(
    BACKWARD,
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? keep, float scale,"
    " Tensor M, Tensor kbar, Tensor vbar) -> (Tensor d_query, Tensor d_key, Tensor d_value)",
)

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


@torch.library.impl(FORWARD, "default")
def _(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Four:
    with without_autocast(query):
        out, state = aten.forward(query, key, value, keep, scale)
    return _tokens_first(out), *state


@torch.library.impl(FORWARD, "cpu")
def _(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Four:
    with without_autocast(query):
        out, state = cpu.forward(query, key, value, keep, scale)
    return out, *state


@torch.library.impl(FORWARD, "cuda")
def _(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Four:
    with without_autocast(query):
        kernels = gpu.kernels("taylor.triton") if gpu.available(query.device) else aten
        out, state = kernels.forward(query, key, value, keep, scale)
    return _tokens_first(out), *state


@torch.library.register_fake(FORWARD)  # type: ignore[untyped-decorator]
def _(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Four:
    batch, heads, queries, dim = query.shape
    value_dim, wide = value.shape[3], aten.accumulate_dtype(query.dtype)
    return (
        cpu.tokens_first(query, queries, value_dim),
        query.new_empty(batch, heads, dim, value_dim, dtype=wide),
        query.new_empty(batch, heads, 1, dim, dtype=wide),
        query.new_empty(batch, heads, 1, value_dim, dtype=wide),
    )


@torch.library.impl(BACKWARD, "default")
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, *state: Tensor
) -> Three:
    with without_autocast(query):
        d_query, d_key, d_value = aten.backward(grad, query, key, value, keep, scale, AffineState(*state))
    return _tokens_first(d_query), _tokens_first(d_key), _tokens_first(d_value)


@torch.library.impl(BACKWARD, "cpu")
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, *state: Tensor
) -> Three:
    with without_autocast(query):
        return cpu.backward(grad, query, key, value, keep, scale, AffineState(*state))


@torch.library.impl(BACKWARD, "cuda")
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, *state: Tensor
) -> Three:
    with without_autocast(query):
        kernels = gpu.kernels("taylor.triton") if gpu.available(query.device) else aten
        d_query, d_key, d_value = kernels.backward(grad, query, key, value, keep, scale, AffineState(*state))
    return _tokens_first(d_query), _tokens_first(d_key), _tokens_first(d_value)


@torch.library.register_fake(BACKWARD)  # type: ignore[untyped-decorator]
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, *state: Tensor
) -> Three:
    d_query, d_key, d_value = (cpu.tokens_first(t, t.shape[2], t.shape[3]) for t in (query, key, value))
    return d_query, d_key, d_value


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    query, key, value, keep, ctx.scale = inputs
    _, M, kbar, vbar = output
    ctx.save_for_backward(query, key, value, keep, M, kbar, vbar)
    ctx.mark_non_differentiable(M, kbar, vbar)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None, None]:
    query, key, value, keep, *state = ctx.saved_tensors
    grads: Three = torch.ops.vitrify.taylor_attention_backward(grad, query, key, value, keep, ctx.scale, *state)
    return *grads, None, None


def _no_second_derivative(*_: Any) -> None:
    # Without this PyTorch would warn and go on with a wrong number.
    raise UnsupportedError("taylor_attention has no second derivative: backend='aten' has")


torch.library.register_autograd(FORWARD, _backward, setup_context=_setup_context)
torch.library.register_autograd(BACKWARD, _no_second_derivative)


def taylor_attention_op(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Call the registered op and return its first result, the attention (B, H, Nq, Dv)."""
    out: Tensor = torch.ops.vitrify.taylor_attention(query, key, value, keep, scale)[0]
    return out


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
