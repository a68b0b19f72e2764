"""The registered ops `vitrify::hamming_attention` (linear order) and `vitrify::threshold_bits`.

Attention also returns C_k^T V (D x Dv numbers per head), which its backward needs. The backward is an op of its own,
without a derivative: asking for second derivatives is an error, not a wrong number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitrify.errors import UnsupportedError
from vitrify.ops import gpu
from vitrify.ops.autocast import without_autocast
from vitrify.ops.hamming import aten, bits
from vitrify.ops.hamming.aten import Code
from vitrify.ops.taylor.aten import accumulate_dtype
from vitrify.ops.taylor.cpu import tokens_first

FORWARD = "vitrify::hamming_attention"
BACKWARD = "vitrify::hamming_attention_backward"
PACK = "vitrify::threshold_bits"

# keep: bool (B, Nk). code_dim and signed: what codes stored as bits hold. The first result has memory order
# (B, Nq, H, Dv): merging the heads copies nothing.
torch.library.define(
    FORWARD,
    "(Tensor query_code, Tensor key_code, Tensor value, Tensor? keep, int code_dim, bool signed, ScalarType out_dtype)"
    " -> (Tensor out, Tensor matrices)",
)
# Gradients of query_code, key_code and value, each in memory order (B, N, H, width); empty for codes without any.
torch.library.define(
    BACKWARD,
    "(Tensor grad, Tensor query_code, Tensor key_code, Tensor value, Tensor? keep, Tensor matrices,"
    " int code_dim, bool signed) -> (Tensor d_query, Tensor d_key, Tensor d_value)",
)
torch.library.define(PACK, "(Tensor x, Tensor threshold) -> Tensor")

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


@torch.library.impl(FORWARD, "default")
def _(
    query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, dim: int, signed: bool, dtype: torch.dtype
) -> Two:
    with without_autocast(value):
        out, matrices = _kernels(value).forward(query_code, key_code, value, keep, Code(dim, signed), dtype)
        return out, matrices


@torch.library.register_fake(FORWARD)  # type: ignore[untyped-decorator]
def _(
    query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, dim: int, signed: bool, dtype: torch.dtype
) -> Two:
    batch, heads, _, width = value.shape
    out = tokens_first(value, query_code.shape[2], width, dtype)
    return out, value.new_empty(batch, heads, dim, width, dtype=accumulate_dtype(value.dtype))


@torch.library.impl(BACKWARD, "default")
def _(
    grad: Tensor, query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, matrices: Tensor,
    dim: int, signed: bool,
) -> Three:  # fmt: skip
    with without_autocast(value):
        d_query, d_key, d_value = _kernels(value).backward(
            grad, query_code, key_code, value, keep, matrices, Code(dim, signed)
        )
        return d_query, d_key, d_value


@torch.library.register_fake(BACKWARD)  # type: ignore[untyped-decorator]
def _(
    grad: Tensor, query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, matrices: Tensor,
    dim: int, signed: bool,
) -> Three:  # fmt: skip
    d_query, d_key = (aten.empty_gradient(c) for c in (query_code, key_code))
    return d_query, d_key, tokens_first(value, value.shape[2], value.shape[3])


@torch.library.impl(PACK, "default")
def _(x: Tensor, threshold: Tensor) -> Tensor:
    packed: Tensor = (gpu.kernels("hamming.triton") if gpu.available(x.device) else bits).threshold_bits(x, threshold)
    return packed


@torch.library.register_fake(PACK)  # type: ignore[untyped-decorator]
def _(x: Tensor, threshold: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], bits.words(x.shape[-1]), dtype=torch.uint8)


def _kernels(value: Tensor) -> Any:
    return gpu.kernels("hamming.triton") if gpu.available(value.device) else aten


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Two) -> None:
    query_code, key_code, value, keep, *ctx.code, _ = inputs
    ctx.save_for_backward(query_code, key_code, value, keep, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    d_query, d_key, d_value = torch.ops.vitrify.hamming_attention_backward(grad, *saved, *ctx.code)
    d_codes = (d if c.is_floating_point() else None for d, c in zip((d_query, d_key), saved[:2], strict=True))
    return *d_codes, d_value, None, None, None, None


def _no_second_derivative(*_: Any) -> None:
    # Without this PyTorch would warn and go on with a wrong number.
    raise UnsupportedError("hamming_attention has no second derivative: backend='aten' has")


torch.library.register_autograd(FORWARD, _backward, setup_context=_setup_context)
torch.library.register_autograd(BACKWARD, _no_second_derivative)


def hamming_attention_op(
    query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, code: Code, out_dtype: torch.dtype
) -> Tensor:
    """Call the registered op and return its first result, the sums (B, H, Nq, Dv)."""
    out: Tensor = torch.ops.vitrify.hamming_attention(query_code, key_code, value, keep, *code, out_dtype)[0]
    return out
