"""The definition of Hamming attention: masked accumulation. Codes choose what is added; nothing is multiplied.

Plain PyTorch in the dtype of `value`, floating or integer, for small inputs: one D-fold copy of V, one of the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.errors import InputError
from vitrify.ops.taylor.reference import select


def hamming_attention(query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """Accumulate in the linear order, C_q (C_k^T V); shapes as in `vitrify.ops.hamming_attention`, keep bool (B, Nk).

    Raises InputError if the codes are neither all of 0 and 1 nor all of -1 and +1.
    """
    check_code("query_code", query_code)
    check_code("key_code", key_code)
    kept_key, kept_value, _ = select(keep, key_code, value)
    context = masked_sum(kept_key.mT, kept_value)  # (B, H, D, Dv)
    return masked_sum(query_code, context)


def masked_sum(code: Tensor, rows: Tensor) -> Tensor:
    """Return for each line of code (..., M, K) the sum of the rows (..., K, N) that it selects: (..., M, N).

    +1 adds a row, -1 subtracts it, 0 (or False) leaves it out.
    """
    code, rows = code.unsqueeze(-1), rows.unsqueeze(-3)
    selected = torch.where(code > 0, rows, torch.where(code < 0, -rows, 0))
    return selected.sum(-2, dtype=rows.dtype)


def check_code(name: str, code: Tensor) -> None:
    """Raise InputError unless every entry is 0 or 1, or every entry is -1 or +1."""
    values: set[float] = set(torch.unique(code).tolist())
    if not (values <= {0, 1} or values <= {-1, 1}):
        found = ", ".join(f"{v:g}" for v in sorted(values)[:4])
        raise InputError(f"{name} must hold 0 and 1, or -1 and +1, not {found}{', ...' if len(values) > 4 else ''}")
