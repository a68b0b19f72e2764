"""Accelerators at equal budgets: the same area, or the same products a second, as another."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal, get_args

from vitrify.accelerator.hardware import Engine, Hardware, Systolic
from vitrify.accelerator.prices import Prices
from vitrify.errors import InputError, unknown

Budget = Literal["area", "macs"]


def matched(hardware: Hardware, to: Hardware, by: Budget) -> Hardware:
    """Return `hardware` with its arrays scaled to what `to` has, at the clock, node, widths and memories of `to`.

    "area": engines and SRAM together occupy at most as much; "macs": all arrays that are not predictors together have
    at most as many PEs. Arrays keep their shares of the PEs; `sides` says which shapes they take. Lanes stay,
    and so do arrays of one column, which serve another.
    Raises InputError if not even arrays of one PE fit.
    """
    if by not in get_args(Budget):
        raise unknown("budget", str(by), get_args(Budget))
    base = replace(
        hardware,
        name=f"{hardware.name} (equal {by})",
        title=f"{hardware.title}, with the {'area' if by == 'area' else 'PEs'} of {to.name}",
        clock_mhz=to.clock_mhz,
        node_nm=to.node_nm,
        numbers=to.numbers,
        sram_kib=to.sram_kib,
        dram=to.dram,
    )
    limit = _spent(to, by)
    best = _scaled(base, 0.0)
    if _spent(best, by) > limit:
        raise InputError(f"hardware {hardware.name!r} exceeds the {by} of {to.name!r} even with arrays of one PE")
    low, high = 0.0, 1.0
    while _spent(_scaled(base, high), by) <= limit:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        scaled = _scaled(base, middle)
        if _spent(scaled, by) <= limit:
            low = middle
            best = max(best, scaled, key=lambda candidate: _spent(candidate, "macs"))
        else:
            high = middle
    return best


def _scaled(hardware: Hardware, factor: float) -> Hardware:
    engines: dict[str, Engine] = {}
    for name, engine in hardware.engines.items():
        if isinstance(engine, Systolic) and min(engine.rows, engine.columns) > 1:
            rows, columns = sides(engine.pes * factor)
            port = max(1, round(engine.port_bits * (rows * columns / engine.pes) ** 0.5))
            engines[name] = replace(engine, rows=rows, columns=columns, port_bits=port)
        else:
            engines[name] = engine
    return replace(hardware, engines=engines)


def sides(pes: float) -> tuple[int, int]:
    """Return the rows and columns of an array of at most so many PEs that the layers of ViTs fill best.

    >>> sides(4200), sides(2700), sides(7)
    ((64, 64), (40, 64), (2, 3))

    Sides are multiples of 8 where there are 1,024 PEs or more, and one is at most four times the other. Of equally good
    shapes the squarest is taken, with more columns than rows.
    """
    step = 8 if pes >= 1024 else 1
    options = [
        (rows, columns)
        for rows in range(step, int(2 * pes**0.5) + 1, step)
        for columns in range(step, min(int(pes / rows), 4 * rows) + 1, step)
        if rows <= 4 * columns
    ]
    return max(
        options or [(1, 1)], key=lambda s: (s[0] * s[1] * _filled(s[0]) * _filled(s[1]), -abs(s[0] - s[1]), -s[0])
    )


@cache
def _filled(side: int) -> float:
    """Return the mean share of a side that layers of the usual widths keep busy over all their folds."""
    widths = (64, 192, 384, 768)
    return sum(width / (-(-width // side) * side) for width in widths) / len(widths)


def _spent(hardware: Hardware, by: Budget) -> float:
    if by == "area":
        return sum(Prices(hardware).areas().values())
    return float(sum(array.pes for name, array in hardware.arrays.items() if name != "predictor"))
