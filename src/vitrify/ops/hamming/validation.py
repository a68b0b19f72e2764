"""Every argument check of Hamming attention, in one place: shapes, dtypes, masks; never the codes' values."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from vitrify.errors import InputError, UnsupportedError, unknown
from vitrify.ops.hamming.bits import Codes, words

Order = Literal["linear", "quadratic"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CODE_DTYPES = (torch.bool, torch.int8)
BITS = torch.uint8


def check_options(order: str, codes: str, out_dtype: torch.dtype | None) -> None:
    """Raise InputError for unknown orders and codes, or an out_dtype that is not floating."""
    if codes not in get_args(Codes):
        raise unknown("codes", str(codes), get_args(Codes))
    if order not in get_args(Order):
        raise unknown("order", str(order), get_args(Order))
    if out_dtype is not None and out_dtype not in DTYPES:
        raise InputError(f"out_dtype must be float16, bfloat16, float32 or float64, not {out_dtype}")


def check_inputs(query_code: Tensor, key_code: Tensor, value: Tensor, code_dim: int | None) -> int:
    """Return D; raise InputError unless the inputs fit each other in shape, dtype and device.

    query_code (B, H, Nq, D), key_code (B, H, Nk, D), value (B, H, Nk, Dv); for bits, ceil(code_dim / 8) instead of D.
    """
    for name, tensor in (("query_code", query_code), ("key_code", key_code), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a Tensor, not {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise InputError(f"{name} must have 4 axes (batch, heads, tokens, channels), not shape {_shape(tensor)}")
        if tensor.device != value.device:
            raise InputError(f"{name} is on {tensor.device} but value is on {value.device}: all need one device")
    if value.dtype not in DTYPES:
        raise InputError(f"value must be float16, bfloat16, float32 or float64, not {_dtype(value)}")
    for name, code in (("query_code", query_code), ("key_code", key_code)):
        if code.dtype != value.dtype and code.dtype not in (*CODE_DTYPES, BITS):
            raise InputError(
                f"{name} is {_dtype(code)}: codes come as bool, as int8, as bits (uint8) or as value's {_dtype(value)}"
            )
    if key_code.shape[:3] != value.shape[:3]:
        raise InputError(f"key_code {_shape(key_code)} and value {_shape(value)} differ in batch, heads or tokens")
    if query_code.shape[:2] != value.shape[:2]:
        raise InputError(f"query_code {_shape(query_code)} and value {_shape(value)} differ in batch or heads")
    query_dim, key_dim = (_dim(n, c, code_dim) for n, c in (("query_code", query_code), ("key_code", key_code)))
    if query_dim != key_dim:
        raise InputError(f"query_code has {query_dim} bits but key_code has {key_dim}: they must agree")
    if key_code.shape[2] == 0 or key_code.shape[3] == 0:
        raise InputError(f"key_code has shape {_shape(key_code)}: attention needs at least one key token and one bit")
    return key_dim


def check_mask(attn_mask: Tensor | None, value: Tensor) -> Tensor | None:
    """Return the key-padding mask as bool (B, Nk), True = attend, or None.

    Taken: bool of shape (B, 1, 1, Nk) or (1, 1, 1, Nk). Raises UnsupportedError for anything else: sums over all keys
    have no entries to hide one by one.
    """
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise InputError(f"attn_mask must be a bool Tensor or None, not {type(attn_mask).__name__}")
    batch, _, keys, _ = value.shape
    wanted = f"Hamming attention takes a bool key-padding mask (True = attend) of shape ({batch}, 1, 1, {keys})"
    if attn_mask.dtype != torch.bool:
        raise UnsupportedError(f"attn_mask is {_dtype(attn_mask)}: {wanted}, and no additive mask or bias")
    if attn_mask.dim() != 4 or attn_mask.shape[1:3] != (1, 1):
        raise UnsupportedError(f"attn_mask has shape {_shape(attn_mask)}: {wanted}")
    if attn_mask.shape[3] != keys or attn_mask.shape[0] not in (1, batch):
        raise InputError(f"attn_mask has shape {_shape(attn_mask)} but value has shape {_shape(value)}: {wanted}")
    if attn_mask.device != value.device:
        raise InputError(f"attn_mask is on {attn_mask.device} but value is on {value.device}")
    return attn_mask[:, 0, 0, :].expand(batch, keys)


def _dim(name: str, code: Tensor, code_dim: int | None) -> int:
    """Return the number of channels of a code; bits do not say how many of their last places count."""
    if code.dtype != BITS:
        return code.shape[3]
    if code_dim is None:
        raise InputError(f"{name} is uint8, which holds bits: say with code_dim how many")
    if code.shape[3] != words(code_dim):
        raise InputError(f"{name} {_shape(code)} must have {words(code_dim)} bytes per token for code_dim={code_dim}")
    return code_dim


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
