"""Codes in memory: two per byte up to 4 bits, one per byte above."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def codes_per_byte(bits: int) -> int:
    """Return how many codes share a byte."""
    return 2 if bits <= 4 else 1


def packed_width(width: int, bits: int) -> int:
    """Return the bytes that `width` codes of one output channel take."""
    return -(-width // codes_per_byte(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 (out, bytes); the code of an even input is the low half of its byte, an odd width ends in a 0."""
    codes = codes.flatten(1)
    if codes_per_byte(bits) == 1:
        return codes
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, width: int, bits: int) -> Tensor:
    """Return codes (out, width) from `pack`'s bytes, in their integer dtype."""
    if codes_per_byte(bits) == 1:
        return packed
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :width]
