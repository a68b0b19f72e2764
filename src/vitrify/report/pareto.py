"""An exploration's designs in the plane of two quantities, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from vitrify.accelerator.explore import Exploration, Trial
from vitrify.report.figures import GREY, INK, RIGHT, SOFTMAX, TAYLOR, new_figure, style

LABELS: Mapping[str, str] = {
    "latency_ms": "latency, ms",
    "energy_mj": "energy, mJ",
    "chip_mj": "energy without DRAM, mJ",
    "edp_mj_ms": "energy-delay product, mJ ms",
    "power_w": "power, W",
    "total_mm2": "area, mm²",
    "cycles": "cycles",
}
_WIDE = 5.0
"""From how many times the least value on an axis is logarithmic."""


def pareto(found: Exploration, title: str) -> Figure:
    """Draw the simulated designs, those that break a constraint apart, the front, the best design and the start."""
    x, y = found.plane
    done = [trial for trial in found.trials if trial.status == "done"]
    with style():
        figure = new_figure(7.2, 4.8)
        axes = figure.add_subplot()
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        kept = [trial for trial in done if found.keeps(trial)]
        if broken := [trial for trial in done if not found.keeps(trial)]:
            limits = ", ".join(map(str, found.constraints))
            axes.scatter(*_at(broken, x, y), s=22, facecolors="none", edgecolors=GREY, label=f"breaks {limits}")
        if kept:
            axes.scatter(*_at(kept, x, y), s=22, color=SOFTMAX, alpha=0.75, label="designs")
            line: dict[str, Any] = {"color": TAYLOR, "marker": "o", "markersize": 5, "drawstyle": "steps-post"}
            axes.plot(*_at(found.front, x, y), **line, zorder=4, label="Pareto front")
        if found.start.status == "done":
            axes.scatter(*_at([found.start], x, y), s=130, marker="*", color=INK, zorder=3, label="start")
        if found.best is not None:
            ring: dict[str, Any] = {"facecolors": "none", "edgecolors": RIGHT, "linewidths": 1.8}
            axes.scatter(*_at([found.best], x, y), s=120, **ring, zorder=5, label="best")
        _scale(axes, [*done, *([found.start] if found.start.status == "done" else [])], x, y)
        _draw_limits(axes, found, x, y)
        axes.set_xlabel(f"{LABELS[x]} (lower is better)")
        axes.set_ylabel(f"{LABELS[y]} (lower is better)")
        axes.grid(color=GREY, alpha=0.25, linewidth=0.8)
        if done or found.start.status == "done":
            figure.legend(loc="outside lower center", ncols=3)
        else:
            axes.text(0.5, 0.5, "no design can be simulated", transform=axes.transAxes, ha="center")
    return figure


def _at(trials: Sequence[Trial], x: str, y: str) -> tuple[list[float], list[float]]:
    return [trial.quantities[x] for trial in trials], [trial.quantities[y] for trial in trials]


def _scale(axes: Axes, trials: Sequence[Trial], x: str, y: str) -> None:
    for name, axis, quantity in (("x", axes.xaxis, x), ("y", axes.yaxis, y)):
        values = [trial.quantities[quantity] for trial in trials]
        if values and max(values) > _WIDE * min(values):
            getattr(axes, f"set_{name}scale")("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))


def _draw_limits(axes: Axes, found: Exploration, x: str, y: str) -> None:
    """Draw the constraints on the two quantities, where they are in sight."""
    for constraint in found.constraints:
        for quantity, line, (low, high) in (
            (x, axes.axvline, axes.get_xlim()),
            (y, axes.axhline, axes.get_ylim()),
        ):
            if constraint.quantity == quantity and low < constraint.limit < high:
                line(constraint.limit, color=GREY, linestyle="--", linewidth=1.2)
