"""Every argument check of the Taylor ops, in one place: the backends trust what passed here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrify.errors import InputError, UnsupportedError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise InputError unless they are (B, H, Nq, D), (B, H, Nk, D), (B, H, Nk, Dv) of one float dtype and device."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} must be a Tensor, not {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise InputError(f"{name} must have 4 axes (batch, heads, tokens, head_dim), not shape {_shape(tensor)}")
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} must be float16, bfloat16, float32 or float64, not {_dtype(tensor)}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise InputError(f"{name} is {_dtype(tensor)} but query is {_dtype(query)}: all three need one dtype")
        if tensor.device != query.device:
            raise InputError(f"{name} is on {tensor.device} but query is on {query.device}: all three need one device")
        for axis, axis_name in ((0, "batch"), (1, "heads")):
            if tensor.shape[axis] != query.shape[axis]:
                raise _mismatch(name, tensor, "query", query, axis, axis_name)
    if key.shape[3] != query.shape[3]:
        raise _mismatch("key", key, "query", query, 3, "head_dim")
    if value.shape[2] != key.shape[2]:
        raise _mismatch("value", value, "key", key, 2, "tokens")
    if key.shape[2] == 0 or key.shape[3] == 0:
        raise InputError(f"key has shape {_shape(key)}: attention needs at least one key token and one channel")


def check_scale(scale: float | None, query: Tensor) -> float:
    """Return the scale of the logits, 1 / sqrt(D) by default; raise InputError if it is not a positive number."""
    if scale is None:
        return 1 / math.sqrt(query.shape[3])
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise InputError(f"scale must be a number, not {type(scale).__name__}")
    if not 0 < scale < math.inf:
        raise InputError(f"scale must be positive and finite, not {scale}")
    return float(scale)


def check_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """Return the key-padding mask as bool (B, Nk), True = attend, or None.

    Taken: bool of shape (B, 1, 1, Nk) or (1, 1, 1, Nk). A two-axis mask is refused, because SDPA would read it as
    (Nq, Nk). Raises UnsupportedError for what linear attention cannot carry: additive masks, and masks that vary over
    queries or heads.
    """
    if attn_mask is None:
        return None
    if not isinstance(attn_mask, Tensor):
        raise InputError(f"attn_mask must be a bool Tensor or None, not {type(attn_mask).__name__}")
    batch, keys = query.shape[0], key.shape[2]
    wanted = f"Taylor attention takes a bool key-padding mask (True = attend) of shape ({batch}, 1, 1, {keys})"
    if attn_mask.dtype != torch.bool:
        raise UnsupportedError(f"attn_mask is {_dtype(attn_mask)}: {wanted}, and no additive mask or bias")
    if attn_mask.dim() != 4:
        hint = "; write mask[:, None, None, :] for one of shape (batch, keys)" if attn_mask.dim() == 2 else ""
        raise UnsupportedError(f"attn_mask has shape {_shape(attn_mask)}: {wanted}{hint}")
    if attn_mask.shape[1] != 1 or attn_mask.shape[2] != 1:
        axis = "heads (axis 1)" if attn_mask.shape[1] != 1 else "queries (axis 2)"
        raise UnsupportedError(f"attn_mask of shape {_shape(attn_mask)} may vary over {axis}: {wanted}")
    if attn_mask.shape[3] != keys or attn_mask.shape[0] not in (1, batch):
        raise InputError(f"attn_mask has shape {_shape(attn_mask)} but key has shape {_shape(key)}: {wanted}")
    if attn_mask.device != query.device:
        raise InputError(f"attn_mask is on {attn_mask.device} but query is on {query.device}")
    return attn_mask[:, 0, 0, :].expand(batch, keys)


def check_predictor(threshold: float | Tensor, bits: int) -> None:
    """Raise InputError unless `threshold` is a probability-like number >= 0 (or a 0-dim tensor) and `bits` is 2..16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise InputError(f"bits must be an integer from 2 to 16, not {bits!r}")
    if isinstance(threshold, Tensor):
        # Its value is not read: that would wait for the device, and break compiled graphs.
        if threshold.dim() != 0 or not threshold.is_floating_point():
            got = f"{_dtype(threshold)} of shape {_shape(threshold)}"
            raise InputError(f"threshold must be a number or a 0-dim float tensor, not {got}")
    elif isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise InputError(f"threshold must be a probability, 0 or more (above 1 keeps nothing), not {threshold!r}")


def _mismatch(name: str, tensor: Tensor, other_name: str, other: Tensor, axis: int, axis_name: str) -> InputError:
    return InputError(
        f"{name} {_shape(tensor)} and {other_name} {_shape(other)} differ in {axis_name} (axis {axis}): "
        f"{tensor.shape[axis]} against {other.shape[axis]}"
    )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
