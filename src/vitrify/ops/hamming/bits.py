"""Codes as bits: eight channels of one token and head in a byte, the first channel in the lowest bit.

This is the storage format of codes: (..., D) codes take (..., ceil(D / 8)) bytes, uint8; places beyond D hold 0.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Codes = Literal["binary", "sign"]


def words(code_dim: int) -> int:
    """Return the number of bytes that the bits of one token and head take."""
    return -(-code_dim // 8)


def pack_bits(code: Tensor) -> Tensor:
    """Return the bits of codes (..., D), of any dtype, as uint8 (..., ceil(D / 8)): 1 where a code is above 0."""
    dim = code.shape[-1]
    bits = F.pad((code > 0).to(torch.int32), (0, -dim % 8)).view(*code.shape[:-1], words(dim), 8)
    return (bits * _places(code)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, code_dim: int, codes: Codes, dtype: torch.dtype) -> Tensor:
    """Return bits (..., ceil(D / 8)) as codes (..., D) in `dtype`: 0 and 1 ("binary"), or -1 and +1 ("sign")."""
    found = torch.bitwise_and(packed.to(torch.int32).unsqueeze(-1), _places(packed)) != 0
    bits = found.flatten(-2)[..., :code_dim].to(dtype)
    return bits if codes == "binary" else 2 * bits - 1


def threshold_bits(x: Tensor, threshold: Tensor) -> Tensor:
    """Return pack_bits of x > threshold; x (B, H, N, D), `threshold` of a shape that broadcasts to x's.

    The definition of what the GPU's kernel does in one pass over x.
    """
    return pack_bits(x > threshold)


def _places(like: Tensor) -> Tensor:
    """Return what each of a byte's bits is worth. ONNX Runtime adds and masks int32, not uint8."""
    return torch.tensor([1 << place for place in range(8)], dtype=torch.int32, device=like.device)
