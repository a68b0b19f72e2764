"""The definition: every expert runs on every token, and each token keeps its own expert's row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


def dense(x: Tensor, index: Tensor, experts: Sequence[Expert]) -> Tensor:
    """Return out[t] = experts[index[t]](x)[t]; x (..., C), index (...) -> (..., C_out)."""
    out = experts[0](x)
    for number, expert in enumerate(experts[1:], start=1):
        out = torch.where((index == number).unsqueeze(-1), expert(x), out)
    return out
