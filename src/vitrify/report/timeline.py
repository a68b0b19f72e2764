"""The page of `vitrify simulate`: engines over time, to zoom into, and where time, energy and area went.

One file without references. `timeline.js` draws the jobs, which lie in the page as columns of whole numbers.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from vitrify.accelerator.program import DRAM, Job
from vitrify.accelerator.result import Result
from vitrify.report import simulation
from vitrify.report.breakdown import Breakdown
from vitrify.report.html import Fact, Report, Section, Table, Widget, render
from vitrify.report.simulation import Grid, Run

_COLOURS = {
    "patch embedding": "#8a929b",
    "norms, residuals": "#a58d5c",
    "qkv": "#3a7ec2",
    "attention predict": "#7a4fd0",
    "attention codes": "#7a4fd0",
    "attention qk": "#b04fd0",
    "attention softmax": "#d8423f",
    "attention av": "#e0791b",
    "attention step 1": "#7a4fd0",
    "attention step 2": "#b04fd0",
    "attention step 3": "#d662a8",
    "attention step 4": "#d8423f",
    "attention step 5": "#e0791b",
    "attention step 6": "#e3b21b",
    "attention M": "#b04fd0",
    "attention apply": "#e0791b",
    "attention bias": "#e3b21b",
    "attention core": "#d662a8",
    "proj": "#23a3b8",
    "MLP": "#2c9a51",
    "convolutions": "#6f8f3a",
    "head": "#59616a",
}
_OTHER = "#8a929b"
_WAITS = {"": ("", ""), "operand": ("an operand", "#e3b21b"), DRAM: ("the DRAM", "#d8423f")}
_USES = {
    "working": "#2c9a51",
    "SRAM port": "#7a4fd0",
    "operand": "#e3b21b",
    "DRAM": "#d8423f",
    "not begun, or done": "#c3cad1",
}
_PARTS = {
    "arrays": "#3a7ec2",
    "vector engines": "#e0791b",
    "registers": "#b04fd0",
    "SRAM": "#2c9a51",
    "NoC": "#23a3b8",
    "DRAM": "#8a929b",
}


def page(title: str, size: str, runs: Sequence[Run], found: Breakdown, notes: Sequence[str], command: str) -> str:
    """Return the page as one HTML document. The first run is the one whose timeline it shows, `found` its breakdown."""
    run = runs[0]
    result = run.result
    others = f" Beside it: {', '.join(other.name for other in runs[1:])}." if len(runs) > 1 else ""
    sections = [
        Section("Comparison", "", [_turned(simulation.comparison(runs))]) if len(runs) > 1 else None,
        Section(
            "Timeline",
            "Every job on its engine. Drag to move; zoom with Ctrl and the wheel, a double click, the buttons, or + "
            "and - when the timeline has the focus. Where jobs are narrower than two pixels, the height of a colour is "
            "its share of the time. The line below an engine is yellow while it waits for an operand, red while it "
            "waits for the DRAM.",
            [Widget(_legend(result, found) + _timelines(result, found))],
        ),
        Section(
            "What takes the time, and what waits",
            "",
            [
                Widget(_uses(result, found)),
                *map(_table, (simulation.shares(run, found), simulation.engines(run, found), simulation.stalls(found))),
            ],
        ),
        Section(
            "Energy and area",
            "Published operation energies and areas, scaled to the node; no control, clock tree or leakage.",
            [Widget(_parts(runs)), _table(simulation.components(run))],
        ),
        Section("What to know", "", [Widget(_list(notes))]),
    ]
    used = (
        []
        if run.utilisation is None
        else [Fact(f"{run.utilisation:.0%}", f"utilisation of {found.main}", "products done, of those possible")]
    )
    report = Report(
        title=title,
        lead=f"{size}; {simulation.title(result.hardware)}. Attention: {run.attention}.{others}",
        facts=[
            Fact(f"{result.seconds * 1e3:.3g} ms", "a forward pass", f"{result.cycles:,} cycles"),
            Fact(
                f"{result.total_pj * 1e-9:.3g} mJ",
                "energy",
                f"{(result.total_pj - result.energy_pj[DRAM]) * 1e-9:.3g} mJ without DRAM",
            ),
            Fact(f"{result.total_mm2:.3g} mm²", "area", "engines and SRAM"),
            *used,
        ],
        sections=[section for section in sections if section is not None],
        colophon=[("Command", command), ("Model", result.model), ("Tiles", str(result.mapping))],
    )
    return render(report)


def columns(result: Result, found: Breakdown) -> dict[str, Any]:
    """Return the jobs as the page holds them: for each queue, columns with an entry for each job, in order.

    gap, length   cycles since the end of the job before, and until its own end
    step          its operation's index in `operations` ([index in `groups`, text]), less that of the job before
    tile, wait    indices in `tiles` (texts) and `waits`
    """
    names = list(found.shares)
    tiles: dict[str, int] = {"": 0}
    waits = list(_WAITS)
    queues: dict[str, dict[str, Any]] = {
        name: {"name": name, "gap": [], "length": [], "step": [], "tile": [], "wait": []} for name in found.uses
    }
    last = dict.fromkeys(queues, (0, 0))
    for job in result.jobs:
        queue = queues[job.resource]
        until, before = last[job.resource]
        queue["gap"].append(job.start - until)
        queue["length"].append(job.end - job.start)
        queue["step"].append(job.operation - before)
        queue["tile"].append(tiles.setdefault(_tile(job), len(tiles)))
        queue["wait"].append(waits.index(job.waits))
        last[job.resource] = job.end, job.operation
    operations = []
    for group, placement in zip(found.groups, result.placements, strict=True):
        operation = placement.operation
        text = f"{operation.module} {operation.vector or operation.kind} ({operation.id})".strip()
        operations.append([names.index(group) if group in names else 0, text])
    return {
        "cycles": result.cycles,
        "mhz": result.hardware.clock_mhz,
        "groups": [[name, _COLOURS.get(name, _OTHER)] for name in names],
        "operations": operations,
        "tiles": list(tiles),
        "waits": list(_WAITS.values()),
        "queues": list(queues.values()),
    }


def _tile(job: Job) -> str:
    if job.tile is None:
        return ""
    group, *ranges = job.tile
    spans = [
        f"{what} {low}-{high}" for what, (low, high) in zip(("rows", "columns", "sum"), ranges, strict=True) if high
    ]
    return ", ".join([f"group {group}", *spans] if group else spans)


def _timelines(result: Result, found: Breakdown) -> str:
    blocks = list(found.blocks.items())
    chosen = len(blocks) // 2
    data = json.dumps(columns(result, found), separators=(",", ":")).replace("<", "\\u003c")
    style, script = (
        resources.files("vitrify.report").joinpath(f"timeline.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js")
    )
    markup = f"<style>{style}</style>"
    if blocks:
        options = "".join(
            f'<option value="{low} {high}"{" selected" if index == chosen else ""}>{html.escape(name)}</option>'
            for index, (name, (low, high)) in enumerate(blocks)
        )
        markup += _timeline("One block", blocks[chosen][1], f'<select aria-label="block">{options}</select>')
    markup += _timeline("The whole run", (0, result.cycles), "")
    markup += '<div id="timeline-tip" hidden></div>'
    return markup + f'<script type="application/json" id="timeline-data">{data}</script><script>{script}</script>\n'


def _timeline(caption: str, span: tuple[int, int], select: str) -> str:
    buttons = "".join(
        f'<button type="button" data-act="{act}" aria-label="{label}">{sign}</button>'
        for act, label, sign in (
            ("in", "zoom in", "+"),
            ("out", "zoom out", "&minus;"),
            ("left", "earlier", "&larr;"),
            ("right", "later", "&rarr;"),
            ("home", "as it was", "reset"),
        )
    )
    return (
        f'<figure class="timeline" data-from="{span[0]}" data-to="{span[1]}">'
        f'<div class="controls">{select}{buttons}</div>'
        f'<canvas tabindex="0" role="img" aria-label="{caption}: engines over time"></canvas>'
        f"<figcaption>{caption}: engines over time, in cycles.</figcaption></figure>\n"
    )


def _legend(result: Result, found: Breakdown) -> str:
    seen = {found.groups[job.operation] for job in result.jobs}
    return _swatches((name, _COLOURS.get(name, _OTHER)) for name in found.shares if name in seen)


def _swatches(entries: Iterable[tuple[str, str]]) -> str:
    items = "".join(f'<li><i style="background:{colour}"></i>{html.escape(name)}</li>' for name, colour in entries)
    return f'<ul class="legend">{items}</ul>\n'


def _uses(result: Result, found: Breakdown) -> str:
    colours = list(_USES.items())
    rows = []
    for name, use in found.uses.items():
        counts = (use.working, use.port, use.operand, use.dram, use.outside)
        segments = [(what, count, colour) for (what, colour), count in zip(colours, counts, strict=True)]
        rows.append((name, segments, f"{use.working / max(result.cycles, 1):.0%}", result.cycles))
    return _swatches(colours) + _bars(rows)


def _parts(runs: Sequence[Run]) -> str:
    markup = ""
    for what, digits, parts in (
        ("Energy, mJ", 1e-9, [_by_part(run.result, run.result.energy_pj) for run in runs]),
        ("Energy without DRAM, mJ", 1e-9, [_by_part(run.result, run.result.energy_pj, dram=False) for run in runs]),
        ("Area, mm²", 1.0, [_by_part(run.result, run.result.area_mm2) for run in runs]),
    ):
        most = max(sum(part.values()) for part in parts)
        rows = [
            (run.name, [(n, v, _PARTS[n]) for n, v in part.items()], f"{sum(part.values()) * digits:.3g}", most)
            for run, part in zip(runs, parts, strict=True)
        ]
        markup += f"<h3>{what}</h3>{_bars(rows)}"
    return _swatches(_PARTS.items()) + markup


def _by_part(result: Result, amounts: Any, *, dram: bool = True) -> dict[str, float]:
    """Add up components of the same kind, so that hardware with other engines compares."""
    found = dict.fromkeys(_PARTS, 0.0)
    plain = {"registers": "registers", "sram": "SRAM", "noc": "NoC", DRAM: "DRAM"}
    for name, amount in amounts.items():
        part = plain.get(name) or ("arrays" if name in result.hardware.arrays else "vector engines")
        found[part] += amount if dram or name != DRAM else 0.0
    return found


def _bars(rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], str, float]]) -> str:
    """Return bars of (label, [(what, amount, colour)], text behind it, amount of a full bar)."""
    markup = ""
    for label, segments, text, full in rows:
        pieces = "".join(
            f'<i style="width:{100 * amount / (full or 1):.3f}%;background:{colour}" '
            f'title="{html.escape(what)}: {amount / (sum(each[1] for each in segments) or 1):.1%}"></i>'
            for what, amount, colour in segments
            if amount
        )
        markup += f"<span>{html.escape(label)}</span><div>{pieces}</div><span>{text}</span>"
    return f'<div class="bars">{markup}</div>\n'


def _list(lines: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{html.escape(line)}</li>" for line in lines)}</ul>\n'


def _table(grid: Grid) -> Table:
    return Table(grid.header, grid.rows, ": ".join(text for text in (grid.title, grid.caption) if text))


def _turned(grid: Grid) -> Table:
    """Return a table with its rows as columns: a few hardware have many figures."""
    names = ["", *(row[0] for row in grid.rows)]
    return Table(names, list(zip(grid.header[1:], *(row[1:] for row in grid.rows), strict=True)), grid.caption)
