"""Hamming attention as two matrix products, for every device and for exported graphs.

A product with codes adds and subtracts, whatever instruction carries it out: what it would cost as additions is for
the cost model and for kernels to say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitrify.ops.hamming.bits import unpack_bits
from vitrify.ops.hamming.validation import Order
from vitrify.ops.taylor.aten import accumulate_dtype
from vitrify.ops.taylor.cpu import tokens_first
from vitrify.ops.taylor.reference import select


class Code(NamedTuple):
    """What codes hold: `dim` channels per token and head, and where they are stored as bits, -1 and +1 if `signed`."""

    dim: int
    signed: bool


def decode(code_of: Tensor, code: Code, dtype: torch.dtype) -> Tensor:
    """Return codes (..., D) in `dtype`, from bits (uint8) or from numbers."""
    if code_of.dtype == torch.uint8:
        return unpack_bits(code_of, code.dim, "sign" if code.signed else "binary", dtype)
    return code_of.to(dtype)


def sums(query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, code: Code, order: Order) -> Tensor:
    """Return the sums (B, H, Nq, Dv), in float64 for float64 values and in float32 for all others."""
    query_code, key_code, value = _wide(query_code, key_code, value, keep, code)
    if order == "linear":
        return query_code @ (key_code.mT @ value)
    return (query_code @ key_code.mT) @ value


def forward(
    query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, code: Code, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the sums in the linear order, in memory order (B, Nq, H, Dv), and C_k^T V (B, H, D, Dv) for `backward`."""
    query_code, key_code, wide = _wide(query_code, key_code, value, keep, code)
    matrices = key_code.mT @ wide
    out = tokens_first(value, query_code.shape[2], value.shape[3], out_dtype)
    return out.copy_(query_code @ matrices), matrices


def backward(
    grad: Tensor, query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, matrices: Tensor, code: Code
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of both codes and V, in memory order (B, N, H, width); empty for codes without any."""
    wide_query, wide_key, wide_value = _wide(query_code, key_code, value, keep, code)
    wide_grad = grad.to(wide_value.dtype)
    d_matrices = wide_query.mT @ wide_grad
    d_query, d_key = (empty_gradient(c) for c in (query_code, key_code))
    if query_code.is_floating_point():
        d_query.copy_(wide_grad @ matrices.mT)
    if key_code.is_floating_point():
        d_key.copy_(wide_value @ d_matrices.mT)
    return d_query, d_key, tokens_first(value, value.shape[2], value.shape[3]).copy_(wide_key @ d_matrices)


def empty_gradient(code_of: Tensor) -> Tensor:
    """Return where the gradient of codes goes, (B, H, N, D) in memory order (B, N, H, D); nothing unless they float."""
    if not code_of.is_floating_point():
        return code_of.new_empty(0, dtype=torch.float32)
    return tokens_first(code_of, code_of.shape[2], code_of.shape[3])


def _wide(
    query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, code: Code
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes and V in the dtype of the sums; padded tokens are 0, whatever they hold."""
    wide = accumulate_dtype(value.dtype)
    key_code, value, _ = select(keep, decode(key_code, code, wide), value.to(wide))
    return decode(query_code, code, wide), key_code, value
