"""A benchmark's result as one table for the terminal."""

from __future__ import annotations

from rich.table import Table

from vitrify.bench.roofline import Roofline
from vitrify.bench.runner import Result, Row


def table(result: Result) -> Table:
    """Return the rows with their spread, speed-up, verdict, peak memory and floor; refused rows say why."""
    out = Table(title=f"vitrify bench {result.benchmark}", caption=_caption(result), caption_justify="left")
    varying = [key for key in result.rows[0].case if len({str(row.case[key]) for row in result.rows}) > 1]
    for name in [*varying, "contender"]:
        out.add_column(name)
    for name in ("median ms", "p10 - p90", "speed-up (p10 - p90)", "verdict", "peak MiB", "floor ms"):
        out.add_column(name, justify="right")
    previous = None
    for row in result.rows:
        if previous is not None and row.case != previous:
            out.add_section()
        previous = row.case
        out.add_row(*(str(row.case[key]) for key in varying), row.contender, *_cells(row, result.roofline))
    return out


def milliseconds(value: float) -> str:
    """Return `value` to three digits, without an exponent: 0.0123, 4.56, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cells(row: Row, limits: Roofline) -> tuple[str, ...]:
    floor = milliseconds(limits.floor_ms(row.cost)) if row.cost else ""
    if row.timing is None:
        why = f"not run: {row.not_run}" if row.not_run else f"[red]refused[/]: {row.refused}"
        return (why, "", "", "", "", floor)
    speed = row.speedup
    verdict = {"faster": "green", "slower": "red", "within noise": "yellow"}
    return (
        milliseconds(row.timing.median_ms),
        f"{milliseconds(row.timing.p10_ms)} - {milliseconds(row.timing.p90_ms)}",
        f"{speed.ratio:.2f}x ({speed.p10:.2f} - {speed.p90:.2f})" if speed else "",
        f"[{verdict[speed.verdict]}]{speed.verdict}[/]" if speed else "",
        f"{row.peak_mib:.1f}" if row.peak_mib is not None else "",
        floor,
    )


def _caption(result: Result) -> str:
    limits = result.roofline
    fixed = {k: v for k, v in result.rows[0].case.items() if len({str(row.case[k]) for row in result.rows}) == 1}
    return (
        f"{', '.join(f'{key} {value}' for key, value in fixed.items())}. Every timed output was checked first. "
        f"Speed-up: median of paired rounds; verdict by its 95 % interval. Memory: {result.memory_method}. "
        f"Floor: {limits.bandwidth_gb_s:.1f} GB/s, {limits.peak_gflop_s:.0f} GFLOP/s ({limits.dtype}), measured.\n"
        f"{result.machine}"
    )
