"""Taylor attention with QT-ViT's second-order term reduced to its squares; docs/papers.md 4. O(n d^2) too."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.ops.taylor import aten


def forward(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Return the attention with weights proportional to 1 + x_ij + 1/2 scale^2 sum_a q_ia^2 k^_ja^2, rows summing to 1.

    The centred keys sum to 0, so a row sums to n + 1/2 scale^2 q^2 . sum_j k^_j^2 >= n: never 0. Values are centred
    too: rows sum to 1, so vbar comes back exactly, and a common offset in V costs no digits.
    """
    centred_key, centred_value, _, vbar, n = aten.centre(keep, key, value)
    scaled = query.to(vbar.dtype) * scale
    squared_keys, squared_queries = centred_key.square(), scaled.square() / 2
    first, second = centred_key.mT @ centred_value, squared_keys.mT @ centred_value
    numerator = torch.cat((scaled, squared_queries), -1) @ torch.cat((first, second), -2)
    denominator = n + squared_queries @ squared_keys.sum(-2, keepdim=True).mT
    return (vbar + numerator / denominator).to(query.dtype)
