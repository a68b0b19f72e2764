"""Attention among binary codes (ShiftAddViT): both products only add. The maths is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.ops.autocast import under_autocast, without_autocast
from vitrify.ops.hamming import aten, validation
from vitrify.ops.hamming.validation import Order
from vitrify.ops.tracing import fx_leaf


@fx_leaf
def hamming_attention(
    query_code: Tensor,
    key_code: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    order: Order = "linear",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The plain sum out_i = sum_j (c_i . c_j) v_j over binary codes: no scale, no normalisation, no mean.

        query_code (B, H, Nq, D), key_code (B, H, Nk, D), value (B, H, Nk, Dv) -> (B, H, Nq, Dv)
        value: float16 | bfloat16 | float32 | float64. The codes are 0 and 1, or -1 and +1: in value's dtype, which
        carries gradients (straight-through codes), or as bool or int8, which do not.
        attn_mask: bool key-padding mask (B, 1, 1, Nk) or (1, 1, 1, Nk), True = attend; padded tokens may hold NaN.
    `order`: "linear" is C_q (C_k^T V), which only adds; "quadratic" is (C_q C_k^T) V, whose second product multiplies V
    by integers up to D in size. They differ by rounding only.
    float16 and bfloat16 are accumulated in float32. The result has value's dtype, or `out_dtype`: sums reach
    Nk D max|v|, which float16 cannot always hold. Under autocast the floating inputs are cast as SDPA's are.

    The codes' values are not checked, as that would wait for the device: `reference.hamming_attention` does.
    Raises InputError (shapes, dtypes, order) and UnsupportedError (any mask but key padding).
    ShiftAddViT, section 4; docs/papers.md.
    """
    if isinstance(value, Tensor) and under_autocast(value):
        dtype = torch.get_autocast_dtype(value.device.type)
        query_code, key_code, value = (
            t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (query_code, key_code, value)
        )
    validation.check_options(order, out_dtype)
    validation.check_inputs(query_code, key_code, value)
    keep = validation.check_mask(attn_mask, value)
    with without_autocast(value):
        return aten.forward(query_code, key_code, value, keep, order).to(out_dtype or value.dtype)


__all__ = ["Order", "hamming_attention"]
