"""Cycles and SRAM traffic of one product on a systolic array, in closed form, for each dataflow.

>>> product((197, 192, 576), 64, 64, "weight").every_fold  # SCALE-Sim says 10448: its count starts at 0
10449
>>> product((64, 197, 64), 64, 64, "output").every_fold
323
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from vitrify.accelerator.hardware import Dataflow


class Product(NamedTuple):
    """What a product (m, k) x (k, n) costs on an array.

    occupied    cycles for which the array is taken: folds overlap, the next one filling as the last one drains
    latency     cycles from then to the last result: the way through the array, and loading what stays in it
    every_fold  cycles if the array drains between folds, as SCALE-Sim has it: nothing overlaps
    left, right, partial   elements of the operands read, and of partial sums written and read again, at the SRAM
    dataflow, rows, columns   how it was mapped: what stayed in the PEs, and the part of the array that was used
    """

    occupied: int
    latency: int
    every_fold: int
    left: int
    right: int
    partial: int
    dataflow: Dataflow
    rows: int
    columns: int


@cache
def product(shape: tuple[int, int, int], rows: int, columns: int, dataflow: Dataflow) -> Product:
    """Return the costs of a product of `shape` = (m, k, n) under one dataflow.

    Output-stationary: both operands stream for k cycles, sums stay. Weight-stationary: the right operand stays, the
    left one streams for m cycles, sums move down; what stays next is loaded meanwhile, in as many cycles as it has
    rows. Input-stationary: the same with the operands' roles changed. Partial sums over several folds of k wait
    outside of the array.
    """
    m, k, n = shape
    if dataflow == "output":
        folds = _ceil(m, rows) * _ceil(n, columns)
        way = rows + columns - 2
        left, right = m * k * _ceil(n, columns), k * n * _ceil(m, rows)
        return Product(folds * k, way, folds * (k + way), left, right, 0, dataflow, rows, columns)
    streamed, kept = (m, n) if dataflow == "weight" else (n, m)
    sums = _ceil(k, rows)
    folds = sums * _ceil(kept, columns)
    way = 2 * rows + columns - 2
    again = _ceil(kept, columns)
    left, right = (m * k * again, k * n) if dataflow == "weight" else (m * k, k * n * again)
    occupied = folds * max(streamed, min(rows, k))
    return Product(
        occupied, way, folds * (streamed + way), left, right, 2 * m * n * (sums - 1), dataflow, rows, columns
    )


@cache
def best(
    shape: tuple[int, int, int],
    rows: int,
    columns: int,
    dataflows: Sequence[Dataflow],
    limit: int | None,
    drains: bool = False,
) -> Product:
    """Return the mapping with the fewest cycles, of the dataflows and of the array's corners down to 8 x 8.

    limit: use no more rows and columns than this. Small products may leave a small corner sooner than the whole array.
    drains: compare cycles of arrays that drain between folds, and use them whole, as SCALE-Sim does.
    """
    if drains:
        return min((product(shape, rows, columns, flow) for flow in dataflows), key=lambda option: option.every_fold)
    corners = {(min(rows, size), min(columns, size)) for size in (8, 16, 32, 64, 128, 256, limit or max(rows, columns))}
    allowed = [corner for corner in sorted(corners, reverse=True) if limit is None or max(corner) <= limit]
    options = [product(shape, r, c, dataflow) for dataflow in dataflows for r, c in allowed]
    return min(options, key=lambda option: option.occupied + option.latency)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
