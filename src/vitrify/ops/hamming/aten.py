"""Hamming attention as two matrix products, for every device and for exported graphs.

A product with codes adds and subtracts, whatever instruction carries it out: what it would cost as additions is for
the cost model and for kernels to say.
"""

from __future__ import annotations

from torch import Tensor

from vitrify.ops.hamming.validation import Order
from vitrify.ops.taylor.aten import accumulate_dtype
from vitrify.ops.taylor.reference import select


def forward(query_code: Tensor, key_code: Tensor, value: Tensor, keep: Tensor | None, order: Order) -> Tensor:
    """Return the sums (B, H, Nq, Dv), in float64 for float64 values and in float32 for all others."""
    key_code, value, _ = select(keep, key_code, value)
    wide = accumulate_dtype(value.dtype)
    query_code, key_code, value = query_code.to(wide), key_code.to(wide), value.to(wide)
    if order == "linear":
        return query_code @ (key_code.mT @ value)
    return (query_code @ key_code.mT) @ value
