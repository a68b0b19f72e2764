"""Write the tables of README.md from results/: `python benchmarks/tables.py`. No number in them is typed by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from runs import CPU, GPU, Run

from vitrify.bench.table import milliseconds

HERE = Path(__file__).parent
START, END = "<!-- tables: python benchmarks/tables.py -->", "<!-- end of tables -->"


def main() -> None:
    """Replace what stands between the two marks of README.md."""
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{tables(HERE)}\n{END}{after}", encoding="utf-8")


def tables(folder: Path) -> str:
    """Return every table: one per benchmark and machine that has results, and a line for each that is not measured."""
    parts = []
    for benchmark in dict.fromkeys(run.benchmark for run in CPU):
        for kind, runs in (("CPU", CPU), ("GPU", GPU)):
            todo = []
            for run in (run for run in runs if run.benchmark == benchmark):
                files = sorted((folder / run.where).glob(f"{benchmark}-*.json"))
                results = [result for path in files if _kind(result := json.loads(path.read_text())) == kind]
                parts += [table(result) for result in results]
                todo += [] if results else [run]
            if todo:
                parts.append(f"### {benchmark}, {kind}\n\n{_not_measured(todo, kind)}\n")
    return "\n".join(parts)


def _kind(result: dict[str, Any]) -> str:
    return "GPU" if result["machine"]["device"].startswith("cuda") else "CPU"


def _not_measured(runs: list[Run], kind: str) -> str:
    if kind == "CPU":
        return "  \n".join(f"`{run.command}`: not measured." for run in runs)
    folders = Counter(str(Path(run.where).parent if "/" in run.where else run.where) for run in runs)
    return f"`make bench-gpu`: not measured, {', '.join(f'{n} in `{name}`' for name, n in folders.items())}."


def table(result: dict[str, Any]) -> str:
    """Return one result as Markdown: medians, speed-ups, floors, and who was refused or not to be had."""
    machine = result["machine"]
    where = machine["gpu"] if machine["device"].startswith("cuda") else f"{machine['cpu']}, {machine['cores']} cores"
    cases = [row["case"] for row in result["rows"]]
    varying = [key for key in cases[0] if len({str(case[key]) for case in cases}) > 1]
    head = [*varying, "contender", "median ms", "10 % to 90 %", "speed-up", "predicted", "floor ms", "of the roofline"]
    lines = [
        f"### {result['benchmark']}, {where}\n",
        f"`{result['command']}`  ",
        f"torch {machine['versions']['torch']}, {machine['threads']} threads, {machine['isa']}, load "
        f"{machine['load_average']:.1f} before the start, {machine['date']}\n",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    lines += [
        f"| {' | '.join([*(str(row['case'][key]) for key in varying), *_cells(row, result)])} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    timing, speedup, floor = row["timing"], row["speedup"], row["floor_ms"]
    if timing is None:
        absent = row.get("not_run")  # files from before there was such a thing have none
        return [row["contender"], f"not run: {absent}" if absent else f"refused: {row['refused']}", *[""] * 5]
    return [
        row["contender"],
        milliseconds(timing["median_ms"]),
        f"{milliseconds(timing['p10_ms'])} to {milliseconds(timing['p90_ms'])}",
        f"{speedup['ratio']:.2f}x, {speedup['verdict']}" if speedup else "",
        f"{_floor_of(speedup['over'], row['case'], result) / floor:.2f}x" if speedup else "",
        milliseconds(floor),
        f"{100 * floor / timing['median_ms']:.0f} %",
    ]


def _floor_of(contender: str, case: dict[str, Any], result: dict[str, Any]) -> float:
    rows = (row for row in result["rows"] if row["contender"] == contender and row["case"] == case)
    return float(next(rows)["floor_ms"])


if __name__ == "__main__":
    main()
