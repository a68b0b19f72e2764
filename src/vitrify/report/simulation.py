"""What `vitrify simulate` shows, as plain rows and data: the terminal and the page (`timeline`) both draw these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from vitrify.accelerator.hardware import Hardware, Standing, describe
from vitrify.accelerator.prices import Prices
from vitrify.accelerator.result import Result
from vitrify.cost.graph import Workload
from vitrify.report.breakdown import Breakdown, main_array

_MOST_STALLS = 8
_STANDINGS: tuple[tuple[Standing, str], ...] = (
    ("recalled", "recalled (believed to be the paper's, never checked against it)"),
    ("assumed", "assumed"),
)


@dataclass(frozen=True)
class Run:
    """A hardware, by the name it was asked for, and what it runs: which attention, of which model; and the result."""

    name: str
    attention: str
    result: Result

    @property
    def utilisation(self) -> float | None:
        """The products that the main array did, of those that it could have; None without an array."""
        main = main_array(self.result)
        return self.result.utilisation[main] if main else None


class Grid(NamedTuple):
    """A table: the first column names the row; a caption says how to read it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


def attention_of(workload: Workload) -> str:
    """Return the attention that a workload computes, told from its steps; several if layers differ."""
    steps = {operation.step for operation in workload.operations}
    kinds = []
    if "codes" in steps:
        kinds.append("binary codes")
    if "1" in steps:
        kinds.append("Taylor, Algorithm 1")
    if "M" in steps and "codes" not in steps:
        kinds.append("Taylor, affine")
    if "softmax" in steps:
        kinds.append("softmax")
    return " + ".join(kinds) or "none"


def comparison(runs: Sequence[Run]) -> Grid:
    """Return a row for each hardware; the first is the one that the others are compared with."""
    main = runs[0]
    header = ["hardware", "attention (model)", "cycles", "ms", "attention ms", "mJ", "mJ less DRAM", "mm2"]
    header += ["main array", f"speed-up of {main.name}", f"energy, x {main.name}"]
    rows = []
    for run in runs:
        result = run.result
        per_ms = result.hardware.clock_mhz * 1e3
        rows.append(
            [
                run.name,
                run.attention,
                f"{result.cycles:,}",
                _short(result.seconds * 1e3),
                _short(result.attention_cycles / per_ms),
                _short(result.total_pj * 1e-9),
                _short((result.total_pj - result.energy_pj["dram"]) * 1e-9),
                _short(result.total_mm2),
                "-" if run.utilisation is None else f"{run.utilisation:.1%}",
                f"{result.seconds / main.result.seconds:.2f}x",
                f"{result.total_pj / main.result.total_pj:.2f}x",
            ]
        )
    caption = (
        "attention ms: the time in which a step of attention runs, beside other work or not. main array: products "
        "done, of those its PEs could do in the whole run. Energy without control, clock tree and leakage."
    )
    return Grid("", header, rows, caption)


def shares(run: Run, found: Breakdown) -> Grid:
    """Return a row for each group of modules and step of attention."""
    cycles, energy = max(run.result.cycles, 1), run.result.total_pj or 1.0
    rows = [
        [
            group,
            *(_percent(count / cycles) for count in (share.array, share.waited, share.vectors, share.dram)),
            _percent(share.pj / energy),
            _short(share.pj * 1e-9),
        ]
        for group, share in found.shares.items()
    ]
    others = [name for name in run.result.hardware.arrays if name != found.main]
    beside = f" Other arrays ({', '.join(others)}) work beside it." if others else ""
    return Grid(
        f"Where {run.name} spends its time and energy",
        ["group", f"{found.main or 'array'} works", "and waits", "vector units", "DRAM", "energy", "mJ"],
        rows,
        f"In % of the run; the first two columns add up to it. {found.main or 'The array'} waits until the group's "
        f"next tile can begin. Vector units work side by side, so theirs may pass 100 %.{beside}",
    )


def engines(run: Run, found: Breakdown) -> Grid:
    """Return a row for each queue: what it did, and why it did not."""
    cycles = max(run.result.cycles, 1)
    rows = [[name, *(_percent(count / cycles) for count in asdict(use).values())] for name, use in found.uses.items()]
    return Grid(
        "What engines wait for",
        ["engine", "working", "SRAM port", "operand", "DRAM", "not begun, or done"],
        rows,
        "In % of the run. A unit of a vector engine has its own row. operand: until another engine has made it.",
    )


def stalls(found: Breakdown) -> Grid:
    """Return the main array's longest waits, by what could not begin and what it waited for."""
    cycles = max(sum(share.array + share.waited for share in found.shares.values()), 1)
    rows = [
        [f"{stall.group}, for {stall.reason}", f"{stall.cycles:,}", _percent(stall.cycles / cycles)]
        for stall in found.stalls[:_MOST_STALLS]
    ]
    return Grid(f"What {found.main} waits for", ["what could not begin, for what", "cycles", "of the run"], rows)


def components(run: Run) -> Grid:
    """Return energy and area by component."""
    result = run.result
    rows = [
        [
            name,
            _short(pj * 1e-9),
            _percent(pj / (result.total_pj or 1)),
            _short(result.area_mm2[name]) if name in result.area_mm2 else "-",
        ]
        for name, pj in result.energy_pj.items()
    ]
    return Grid("Components", ["component", "mJ", "of the energy", "mm2"], rows)


def notes(runs: Sequence[Run]) -> Iterator[str]:
    """Give what a reader must know: which figures nobody has checked, synthetic masks, operators without a rule."""
    for run in runs:
        hardware = run.result.hardware
        for note in run.result.notes:
            yield f"{run.name}: {note}"
        for standing, meaning in _STANDINGS:
            places = [place for place, kind in hardware.standing.items() if kind == standing]
            if places:
                yield f"{run.name}: {meaning}: {', '.join(places)}"
    priced = {run.result.hardware.dram.energy: Prices(run.result.hardware).levels["dram"] for run in runs}
    yield "DRAM: " + ", ".join(f"{name} at {price:.3g} pJ a bit" for name, price in priced.items())


def to_dict(run: Run) -> dict[str, Any]:
    """Return a run as plain data: counts in cycles, bits and pJ, and the hardware that it was."""
    result = run.result
    return {
        "name": run.name,
        "attention": run.attention,
        "cycles": result.cycles,
        "attention_cycles": result.attention_cycles,
        "seconds": result.seconds,
        "energy_pj": dict(result.energy_pj),
        "area_mm2": dict(result.area_mm2),
        "bits": dict(result.bits),
        "macs": dict(result.macs),
        "utilisation": result.utilisation,
        "mapping": asdict(result.mapping),
        "queues": {name: asdict(queue) for name, queue in result.queues.items()},
        "notes": list(result.notes),
        "hardware": describe(result.hardware),
    }


def title(hardware: Hardware) -> str:
    """Return a hardware in words: its title, arrays, clock and node."""
    arrays = ", ".join(f"{name} {array.rows} x {array.columns}" for name, array in hardware.arrays.items())
    return f"{hardware.title}: {arrays}; {hardware.clock_mhz:g} MHz, {hardware.node_nm:g} nm"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _short(value: float) -> str:
    """Write three digits, or all of the whole part."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
