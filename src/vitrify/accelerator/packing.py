"""What sparse attention masks cost the arrays of Sanger and ViTCoD: passes over packed rows, dense and sparse parts.

A mask is a bool array (..., queries, keys), True where an entry is kept; the leading axes are heads and images, and
each head is packed by itself, since heads share no keys.

Sanger (Lu et al., MICRO 2021) packs and splits: the keys come in tiles of `ports`, and what a query keeps of a tile is
split into sub-rows of at most `columns` entries. A sub-row takes one row of the array for one pass, whichever query it
is of; a query that keeps nothing of a tile takes none. All sub-rows of a pass are of the same tile, whose keys stream
through the array.

ViTCoD (You et al., HPCA 2023) reorders the tokens so that the keys which many queries attend to, the global tokens,
come first: they go to a denser engine as full columns, and what is left to a sparser one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrify.errors import InputError

Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


def packed_rounds(mask: Mask, rows: int, columns: int, ports: int = 64) -> int:
    """Return how many passes an array of rows x columns PEs takes over the mask, all heads together.

    >>> packed_rounds(np.ones((197, 197), bool), rows=64, columns=16)  # 3 tiles of 4 sub-rows and one of 5 keys
    43
    """
    if rows < 1:
        raise InputError(f"an array needs at least one row of PEs, not {rows}")
    return int(-(-sub_rows(mask, columns, ports).sum(-1) // rows).sum())


def load_balance(mask: Mask, rows: int, columns: int, ports: int = 64) -> float:
    """Return the share of the PEs that compute a kept entry, over all passes; 1 if nothing is kept."""
    rounds = packed_rounds(mask, rows, columns, ports)
    return int(np.count_nonzero(mask)) / (rounds * rows * columns) if rounds else 1.0


def sub_rows(mask: Mask, columns: int, ports: int = 64) -> Counts:
    """Return into how many sub-rows each query's part of each tile is split: (..., tiles, queries).

    Raises InputError for anything but a bool mask of at least two axes, and for arrays without columns or ports.
    """
    _check(mask)
    if columns < 1 or ports < 1:
        raise InputError(f"an array needs at least one column and one port, not {columns} and {ports}")
    *lead, queries, keys = mask.shape
    tiles = math.ceil(keys / ports)
    padded = np.zeros((*lead, queries, tiles * ports), np.uint8)
    padded[..., :keys] = mask
    kept = padded.reshape(*lead, queries, tiles, ports).sum(-1, dtype=np.int64)
    split: Counts = -(-kept // columns)
    return split.swapaxes(-1, -2)


@dataclass(frozen=True)
class Polarised:
    """A mask as ViTCoD splits it; each array has the mask's leading axes.

    queries, keys   of the mask
    global_tokens   (...): how many keys the denser engine takes, as full columns
    rest            (..., queries): kept entries of each query among the other keys, for the sparser engine
    """

    queries: int
    keys: int
    global_tokens: Counts
    rest: Counts

    @property
    def denser(self) -> Counts:
        """Scores that the denser engine computes, by head: full columns, whatever the mask drops of them."""
        return self.global_tokens * self.queries

    @property
    def sparser(self) -> Counts:
        """Scores that the sparser engine computes, by head."""
        total: Counts = self.rest.sum(-1)
        return total


def polarise(mask: Mask, threshold: int | None = None) -> Polarised:
    """Split a mask as ViTCoD does: keys that more than `threshold` queries attend to are global tokens.

    threshold   by default a quarter of the queries, rounded up: at 197 tokens the 50 of the released code
    Raises InputError for anything but a bool mask of at least two axes, and for a negative threshold.
    """
    _check(mask)
    if threshold is not None and threshold < 0:
        raise InputError(f"threshold must be a number of queries, not {threshold}")
    queries, keys = mask.shape[-2:]
    columns = mask.sum(-2, dtype=np.int64)
    is_global = columns > (math.ceil(queries / 4) if threshold is None else threshold)
    tokens: Counts = is_global.sum(-1, dtype=np.int64)
    rest: Counts = (mask & ~is_global[..., None, :]).sum(-1, dtype=np.int64)
    return Polarised(queries, keys, tokens, rest)


def _check(mask: Any) -> None:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim < 2 or not mask.size:
        found = f"{mask.dtype} {mask.shape}" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise InputError(f"a mask must be a bool array (..., queries, keys), not {found}")
