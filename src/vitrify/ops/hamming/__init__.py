"""Attention among binary codes (ShiftAddViT): both products only add. The maths is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.errors import InputError, unknown
from vitrify.ops import gpu
from vitrify.ops.autocast import under_autocast, without_autocast
from vitrify.ops.hamming import aten, bits, validation
from vitrify.ops.hamming.aten import Code
from vitrify.ops.hamming.bits import Codes, pack_bits, unpack_bits
from vitrify.ops.hamming.registration import hamming_attention_op
from vitrify.ops.hamming.traffic import bytes_moved
from vitrify.ops.hamming.validation import Order
from vitrify.ops.tracing import exporting, fx_leaf

BACKENDS = ("aten", "triton")


@fx_leaf
def hamming_attention(
    query_code: Tensor,
    key_code: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    order: Order = "linear",
    out_dtype: torch.dtype | None = None,
    code_dim: int | None = None,
    codes: Codes = "binary",
    backend: str | None = None,
) -> Tensor:
    """The plain sum out_i = sum_j (c_i . c_j) v_j over binary codes: no scale, no normalisation, no mean.

        query_code (B, H, Nq, D), key_code (B, H, Nk, D), value (B, H, Nk, Dv) -> (B, H, Nq, Dv)
        value: float16 | bfloat16 | float32 | float64. The codes are 0 and 1, or -1 and +1: in value's dtype, which
        carries gradients (straight-through codes), or as bool or int8, which do not; or packed, eight to a byte, as
        `pack_bits` and `threshold_bits` give them, uint8 (B, H, N, ceil(D / 8)): `code_dim` says D, and `codes` whether
        a bit that is not set means 0 ("binary") or -1 ("sign").
        attn_mask: bool key-padding mask (B, 1, 1, Nk) or (1, 1, 1, Nk), True = attend; padded tokens may hold NaN.
    `order`: "linear" is C_q (C_k^T V), which only adds; "quadratic" is (C_q C_k^T) V, whose second product multiplies V
    by integers up to D in size. They differ by rounding only.
    float16 and bfloat16 are accumulated in float32. The result has value's dtype, or `out_dtype`: sums reach
    Nk D max|v|, which float16 cannot always hold. Under autocast the floating inputs are cast as SDPA's are.
    `backend`: "aten", plain PyTorch calls, differentiated by autograd; "triton", the kernels for NVIDIA GPUs (in any
    process with TRITON_INTERPRET=1, slowly, on tensors of any device), linear order only, in a registered op with a
    closed-form backward. None picks "triton" where it can run, except while a graph is exported.

    The codes' values are not checked, as that would wait for the device: `reference.hamming_attention` does.
    Raises InputError (shapes, dtypes, order, codes, backend) and UnsupportedError (any mask but key padding).
    ShiftAddViT, section 4; docs/papers.md.
    """
    if isinstance(value, Tensor) and under_autocast(value):
        dtype = torch.get_autocast_dtype(value.device.type)
        query_code, key_code, value = (
            t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t
            for t in (query_code, key_code, value)
        )
    validation.check_options(order, codes, out_dtype)
    code = Code(validation.check_inputs(query_code, key_code, value, code_dim), codes == "sign")
    keep = validation.check_mask(attn_mask, value)
    if backend not in (None, *BACKENDS):
        raise unknown("backend", str(backend), BACKENDS)
    here = gpu.available(value.device)
    if backend == "triton" and (order != "linear" or not (here or gpu.interpreting())):
        raise InputError(
            "backend 'triton' takes the linear order, and tensors on an NVIDIA GPU (compute capability 8.0, Triton "
            f"installed), not {order} on {value.device}: leave it out, or 'aten'"
        )
    out: Tensor
    if backend == "triton" and not here:
        kernels = gpu.kernels("hamming.triton")
        out = kernels.interpreted(query_code, key_code, value, keep, code, out_dtype or value.dtype)
        return out
    if backend == "triton" or (backend is None and order == "linear" and here and not exporting()):
        return hamming_attention_op(query_code, key_code, value, keep, code, out_dtype or value.dtype)
    with without_autocast(value):
        return aten.sums(query_code, key_code, value, keep, code, order).to(out_dtype or value.dtype)


@fx_leaf
def threshold_bits(x: Tensor, threshold: Tensor) -> Tensor:
    """Binarise and pack: the bits of x > threshold, uint8 (B, H, N, ceil(D / 8)), for `hamming_attention`.

    x (B, H, N, D), a view with any strides, as of a packed qkv projection; `threshold` of a shape that broadcasts to
    it, as (H, 1, D), on the same device; both float16 | bfloat16 | float32 | float64. Carries no gradient.
    On an NVIDIA GPU this is one pass over x.

    Raises InputError for other shapes and devices.
    """
    if x.dim() != 4 or x.shape[3] == 0:
        raise InputError(f"x must be (batch, heads, tokens, channels), not of shape {tuple(x.shape)}")
    if threshold.device != x.device:
        raise InputError(f"threshold is on {threshold.device} but x is on {x.device}")
    pairs = zip(reversed(threshold.shape), reversed(x.shape), strict=False)
    if threshold.dim() > 4 or any(size not in (1, wanted) for size, wanted in pairs):
        raise InputError(f"threshold {tuple(threshold.shape)} does not broadcast to x {tuple(x.shape)}")
    if exporting():
        return bits.threshold_bits(x, threshold)
    packed: Tensor = torch.ops.vitrify.threshold_bits(x, threshold)
    return packed


__all__ = ["Codes", "Order", "bytes_moved", "hamming_attention", "pack_bits", "threshold_bits", "unpack_bits"]
