"""What a scratch SRAM costs at 28 nm, by its capacity and port: CACTI's points, and laws between and beyond them.

>>> sram(200, 512).read_pj_per_bit * 512
41.48
>>> sram(100, 512).how
'derived: a power law in capacity and width through the measured points around it'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from vitrify.cost.tables import load
from vitrify.errors import InputError

TABLE = "cacti28"


@dataclass(frozen=True)
class Sram:
    """One memory with a read and a write port.

    read_pj_per_bit, write_pj_per_bit   of an access of the port's full width, divided by that width
    area_mm2, leakage_mw                of the whole memory; the leakage at the temperature that the table states
    how                                 "measured: ..." and CACTI's settings, or "derived: ..." and from what
    """

    read_pj_per_bit: float
    write_pj_per_bit: float
    area_mm2: float
    leakage_mw: float
    how: str


@cache
def sram(capacity_kib: float, width_bits: int) -> Sram:
    """Return what an SRAM of so many KiB costs when its ports are `width_bits` wide.

    Between the points of the table `cacti28` a power law in both joins the neighbours; smaller and larger memories
    continue the nearest two. A port narrower than any point reads the narrowest's word and uses a part; one wider than
    all is made of equal banks side by side, each with its share of capacity and width, the wires between them free.
    At 65 points that the table leaves out CACTI differs from this by 5 % in the median, 23 % at most.
    Raises InputError for a capacity or width that is not positive.
    """
    for name, value in (("capacity_kib", capacity_kib), ("width_bits", width_bits)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"an SRAM's {name} must be positive, not {value!r}")
    points = _points()
    capacities, widths = sorted({c for c, _ in points}), sorted({w for _, w in points})
    banks = math.ceil(width_bits / widths[-1])
    bank = (capacity_kib / banks, max(width_bits / banks, widths[0]))
    read_pj, write_pj, area_mm2, leakage_mw = _read(points, capacities, widths, bank)
    if bank in points:
        how = f"measured: {load(TABLE)[f'sram_read.{bank[0]:g}.{bank[1]:g}'].how}"
    elif capacities[0] <= bank[0] <= capacities[-1]:
        how = "derived: a power law in capacity and width through the measured points around it"
    else:
        how = f"derived: beyond the measured {capacities[0]} to {capacities[-1]} KiB, the nearest points' law continued"
    if width_bits < widths[0]:
        how += f"; {width_bits} bits of a word of {widths[0]}"
    elif banks > 1:
        how += f"; {banks} banks side by side"
    used = width_bits / banks
    return Sram(read_pj / used, write_pj / used, banks * area_mm2, banks * leakage_mw, how)


@cache
def _points() -> dict[tuple[float, float], tuple[float, ...]]:
    """Return (capacity in KiB, width in bits) -> pJ of a read and a write, mm2, mW."""
    table = load(TABLE)
    keys = [key.split(".")[1:] for key in table.entries if key.startswith("sram_read.")]
    sections = ("sram_read", "sram_write", "sram_area", "sram_leakage")
    return {(int(c), int(w)): tuple(table[f"{section}.{c}.{w}"].value for section in sections) for c, w in keys}


def _read(
    points: dict[tuple[float, float], tuple[float, ...]],
    capacities: Sequence[float],
    widths: Sequence[float],
    at: tuple[float, float],
) -> list[float]:
    """Interpolate every quantity, bilinear in the logarithms of capacity, width and value."""
    if at in points:
        return list(points[at])
    c0, c1, along_c = _between(capacities, at[0])
    w0, w1, along_w = _between(widths, at[1])
    weights = {
        (c0, w0): (1 - along_c) * (1 - along_w),
        (c0, w1): (1 - along_c) * along_w,
        (c1, w0): along_c * (1 - along_w),
        (c1, w1): along_c * along_w,
    }
    return [math.exp(sum(weight * math.log(points[corner][i]) for corner, weight in weights.items())) for i in range(4)]


def _between(grid: Sequence[float], value: float) -> tuple[float, float, float]:
    """Return the neighbours of `value` (beyond an end: the nearest two) and how far along it lies, in logarithms."""
    upper = next((i for i, point in enumerate(grid) if point >= value), len(grid) - 1)
    low, high = grid[max(upper, 1) - 1], grid[max(upper, 1)]
    return low, high, math.log(value / low) / math.log(high / low)
