"""How many bytes attention has to move: each input read once, each result written once, nothing read again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from vitrify.errors import unknown
from vitrify.ops.hamming.bits import words

# Bytes per token and head of a code (or of a query or key) of `dim` channels.
STORED: dict[str, Callable[[int], int]] = {
    "sdpa": lambda dim: 2 * dim,
    "bfloat16": lambda dim: 2 * dim,
    "int8": lambda dim: dim,
    "bits": words,
}
Stored = Literal["sdpa", "bfloat16", "int8", "bits"]


def bytes_moved(
    stored: Stored, heads: int, queries: int, keys: int, dim: int, value_dim: int, *, binarised: bool = False
) -> int:
    """Return the bytes of one forward pass of `heads` heads (batch x heads) with bfloat16 values and results.

    stored      "sdpa": queries and keys as bfloat16 numbers; or codes as "bfloat16", "int8" or "bits"
    binarised   count, too, what makes codes of a projection in bfloat16: it is read, and codes are written
    Not in it: D x Dv float32 numbers per head that the Hamming kernels write for a backward pass.
    Raises InputError for another way to store.
    """
    if stored not in STORED:
        raise unknown("way to store codes", str(stored), tuple(STORED))
    tokens = queries + keys
    codes = tokens * STORED[stored](dim)
    made = tokens * 2 * dim + codes if binarised and stored != "sdpa" else 0
    return heads * (codes + tokens * 2 * value_dim + made)
