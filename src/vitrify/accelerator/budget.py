"""Accelerators at equal budgets: the same area, or the same products a second, as another."""

from __future__ import annotations

from dataclasses import replace
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
    """Return the rows and columns of the array with the most PEs up to a number: layers' sizes are multiples of 16.

    >>> sides(4200), sides(600), sides(7)
    ((64, 64), (24, 24), (2, 3))

    Sides are multiples of 16 if that wastes under a tenth, else of 8, of 4, or any; one is at most four times the
    other, and of equally many PEs the squarest array is taken.
    """
    best = (1, 1)
    for step in (16, 8, 4, 1):
        most = int(2 * pes**0.5) // step * step
        options = [
            (rows, columns)
            for rows in range(step, most + 1, step)
            if (columns := int(pes / rows) // step * step) and max(rows, columns) <= 4 * min(rows, columns)
        ]
        if options:
            best = max(options, key=lambda s: (s[0] * s[1], -abs(s[0] - s[1]), -s[0]))
            if best[0] * best[1] >= 0.9 * pes:
                break
    return best


def _spent(hardware: Hardware, by: Budget) -> float:
    if by == "area":
        return sum(Prices(hardware).areas().values())
    return float(sum(array.pes for name, array in hardware.arrays.items() if name != "predictor"))
