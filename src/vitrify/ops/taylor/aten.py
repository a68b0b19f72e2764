"""Taylor attention in a few ATen calls: the kernel where there is no faster one, and what an exported graph holds.

float16 and bfloat16 inputs are accumulated in float32; keys and values are both centred before their product, so that
a large common offset costs no digits (K^T V - n kbar^T vbar would subtract two large numbers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.ops.taylor.reference import AffineState, select


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def centre(keep: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float | Tensor]:
    """Return centred key and value (0 where padded), their means over the valid tokens, and n, in the sums' dtype."""
    dtype = accumulate_dtype(key.dtype)
    key, value, n = select(keep, key.to(dtype), value.to(dtype))
    kbar = key.sum(-2, keepdim=True) / n
    vbar = value.sum(-2, keepdim=True) / n
    key, value, _ = select(keep, key - kbar, value - vbar)
    return key, value, kbar, vbar, n


def forward(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, AffineState]:
    """Z = vbar + Q M in the dtype of `query`, and the state for `backward`; differentiable by autograd too."""
    centred_key, centred_value, kbar, vbar, n = centre(keep, key, value)
    M = (centred_key.mT @ centred_value) * (scale / n)
    out = vbar + query.to(M.dtype) @ M
    return out.to(query.dtype), AffineState(M, kbar, vbar)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, state: AffineState
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed-form gradients (dQ, dK, dV), each in its input's dtype; `reference.affine_backward` in float32."""
    M, kbar, vbar = state
    grad = grad.to(M.dtype)
    centred_key, centred_value, n = select(keep, key.to(M.dtype) - kbar, value.to(M.dtype) - vbar)
    dM = (query.to(M.dtype).mT @ grad) * (scale / n)
    d_query = grad @ M.mT
    d_key = centred_value @ dM.mT
    d_value = centred_key @ dM + grad.sum(-2, keepdim=True) / n
    if keep is not None:
        d_value = d_value.masked_fill(~keep[:, None, :, None], 0)
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype)
