"""Dense attention in float64, on sampled query rows: what a benchmark's outputs are held against.

Written here again from the definitions, not taken from `vitrify.ops`: a mistake there must not vouch for itself.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitrify.bench.registry import Check

MAX_ROWS = 256
Kind = Literal["softmax", "taylor"]


def sample_rows(num_queries: int, device: torch.device) -> Tensor:
    """Return the query rows to compare: all of them, or `MAX_ROWS` spread from the first to the last."""
    count = min(num_queries, MAX_ROWS)
    return torch.linspace(0, num_queries - 1, count, device=device).round().long()


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, kind: Kind) -> Tensor:
    """Evaluate attention through its full weight matrix, in the inputs' own dtype.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, heads, keys, head_dim).
        value: (batch, heads, keys, value_dim).
        scale: what the scores are multiplied by.
        kind: "softmax", or "taylor": weights (1 + scale q.k^) / keys, keys centred over the tokens (docs/papers.md 1).

    Returns:
        (batch, heads, queries, value_dim).
    """
    if kind == "softmax":
        return (query @ key.mT * scale).softmax(dim=-1) @ value
    centred = key - key.mean(dim=-2, keepdim=True)
    return (1 + query @ centred.mT * scale) / key.shape[-2] @ value


def check_attention(output: Tensor, query: Tensor, key: Tensor, value: Tensor, *, scale: float, kind: Kind) -> Check:
    """Compare `output` (batch, heads, queries, value_dim) with the float64 definition.

    The allowed error is twice what plain PyTorch, in the inputs' dtype, loses on the same rows, plus an epsilon band:
    a fast kernel may round differently, not worse. Any NaN or infinity in the whole output fails.
    """
    rows = sample_rows(query.shape[-2], query.device)
    picked = query[..., rows, :]
    exact = dense_attention(picked.double(), key.double(), value.double(), scale=scale, kind=kind)
    plain = dense_attention(picked, key, value, scale=scale, kind=kind)
    largest = exact.abs().max().item()
    tolerance = 2 * _error(plain, exact) / largest + 8 * torch.finfo(query.dtype).eps
    error = _error(output[..., rows, :], exact) / largest if bool(output.isfinite().all()) else float("nan")
    return Check(error, tolerance, f"float64 {kind} attention, {len(rows)} of {query.shape[-2]} query rows")


def _error(output: Tensor, exact: Tensor) -> float:
    return (output.double() - exact).abs().max().item()
