"""The definition of Taylor attention, twice: ViTALiTy's Algorithm 1 step by step, and the affine form it reduces to.

Plain PyTorch in the dtype of its inputs; float64 gives the truth that every other backend is tested against.
Shapes: query (B, H, Nq, D), key (B, H, Nk, D), value (B, H, Nk, Dv), keep bool (B, Nk) with True = attend, or None.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AffineState(NamedTuple):
    """What the affine form keeps for its backward: M (B, H, D, Dv), kbar (B, H, 1, D), vbar (B, H, 1, Dv)."""

    M: Tensor
    kbar: Tensor
    vbar: Tensor


def select(keep: Tensor | None, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return key and value with padded tokens set to 0, and n, the number of valid keys: (B, 1, 1, 1) if masked.

    Set rather than multiplied, so that NaN in padding stays there; n >= 1 makes a fully masked image give 0, not 0/0.
    """
    if keep is None:
        return key, value, key.shape[2]
    padded = ~keep[:, None, :, None]
    n = keep.sum(-1).clamp(min=1).to(key.dtype)
    return key.masked_fill(padded, 0), value.masked_fill(padded, 0), n[:, None, None, None]


def algorithm1(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Algorithm 1 of ViTALiTy (docs/papers.md 1), its six steps in order; (B, H, Nq, Dv). `scale` is 1/sqrt(d)."""
    key, value, n = select(keep, key, value)
    centred = key - key.sum(-2, keepdim=True) / n  # 1: centre the keys over the tokens
    if keep is not None:
        centred = centred.masked_fill(~keep[:, None, :, None], 0)
    context = centred.mT @ value  # 2: global context matrix G
    centred_sum = centred.sum(-2, keepdim=True)  # 3: column sums
    value_sum = value.sum(-2, keepdim=True)
    denominator = n / scale + query @ centred_sum.mT  # 4
    numerator = value_sum / scale + query @ context  # 5
    return numerator / denominator  # 6


def affine(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, AffineState]:
    """Z = vbar + Q M with M = scale / n (K^T V - n kbar^T vbar), equal to Algorithm 1 because centred keys sum to 0."""
    key, value, n = select(keep, key, value)
    kbar = key.sum(-2, keepdim=True) / n
    vbar = value.sum(-2, keepdim=True) / n
    M = scale * (key.mT @ value / n - kbar.mT @ vbar)
    return vbar + query @ M, AffineState(M, kbar, vbar)


def affine_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, state: AffineState
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed-form gradients (dQ, dK, dV) for grad = dZ (B, H, Nq, Dv); docs/papers.md 2."""
    M, kbar, vbar = state
    key, value, n = select(keep, key, value)
    dM = query.mT @ grad
    d_query = grad @ M.mT
    d_key = scale / n * ((value - vbar) @ dM.mT)
    d_value = scale / n * ((key - kbar) @ dM) + grad.sum(-2, keepdim=True) / n
    if keep is not None:
        padded = ~keep[:, None, :, None]
        d_key, d_value = d_key.masked_fill(padded, 0), d_value.masked_fill(padded, 0)
    return d_query, d_key, d_value


def weights(query: Tensor, key: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """The dense attention matrix (1 + scale q.k^) / n, (B, H, Nq, Nk); rows sum to 1, entries may be negative."""
    key, _, n = select(keep, key, key)
    centred, _, _ = select(keep, key - key.sum(-2, keepdim=True) / n, key)
    scores = scale * (query @ centred.mT)
    # Centred keys sum to 0 up to rounding only; the rows' sums meet V's common offset, so they are made 1 once more.
    dense = (1 + scores - scores.detach().sum(-1, keepdim=True) / n) / n
    return dense if keep is None else dense.masked_fill(~keep[:, None, None, :], 0)
