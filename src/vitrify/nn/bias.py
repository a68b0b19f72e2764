"""Biases on the logits (LeViT's relative positions) under the Taylor expansion.

exp(qk + b) ~ 1 + qk + b. With keys *and* bias centred over the keys every row of these weights sums to n, so
    out = taylor(q, k, v) + (b - mean over keys of b) V / n:
the bias becomes a fixed mixing of the tokens, at Nq Nk Dv multiplications per head. Softmax does not see the centring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.ops import sparse_mask, taylor_attention, taylor_weights
from vitrify.ops.tracing import fx_leaf


@fx_leaf
def bias_term(bias: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Return (bias - its mean over the valid keys) V / n.

    bias (H, Nq, Nk) or (B, H, Nq, Nk), value (B, H, Nk, Dv), attn_mask bool (B | 1, 1, 1, Nk) -> (B, H, Nq, Dv).
    """
    return bias_weights(bias, attn_mask).to(value.dtype) @ value


def bias_weights(bias: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Return (bias - its mean over the valid keys) / n, zero where a key is padded."""
    if attn_mask is None:
        return (bias - bias.mean(-1, keepdim=True)) / bias.shape[-1]
    count = attn_mask.sum(-1, keepdim=True).clamp(min=1)
    mean = bias.masked_fill(~attn_mask, 0).sum(-1, keepdim=True) / count
    return (bias - mean).masked_fill(~attn_mask, 0) / count


@fx_leaf
def biased_sparse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    bias: Tensor,
    scale: float,
    threshold: Tensor,
    bits: int,
    low_rank: bool,
) -> tuple[Tensor, Tensor]:
    """Return the training-time attention of a biased layer, and the mask's density (0-dim float32).

    low_rank: taylor + bias_term + (mask * (softmax(qk + b) - taylor_weights - bias_weights)) V; threshold 0 gives
    softmax(qk + b) V. Otherwise softmax(qk + b) over the kept entries alone. Shapes as in `bias_term`.
    """
    kept = sparse_mask(query, key, attn_mask, scale=scale, threshold=threshold, bits=bits)
    scores = query @ key.transpose(-2, -1) * scale + bias
    lowest = torch.finfo(scores.dtype).min
    valid = kept.numel() if attn_mask is None else (attn_mask.sum() * (kept.numel() // attn_mask.numel())).clamp(min=1)
    density = kept.sum() / valid
    if not low_rank:
        # The product with the mask makes a row without kept entries 0 rather than uniform.
        return (scores.masked_fill(~kept, lowest).softmax(-1) * kept).to(value.dtype) @ value, density
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, lowest)
    difference = scores.softmax(-1) - taylor_weights(query, key, attn_mask, scale=scale) - bias_weights(bias, attn_mask)
    out = taylor_attention(query, key, value, attn_mask, scale=scale) + bias_term(bias, value, attn_mask)
    return out + (difference * kept).to(value.dtype) @ value, density
