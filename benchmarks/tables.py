"""Write the tables of README.md from results/: `python benchmarks/tables.py`. No number in them is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitrify.bench.table import milliseconds

HERE = Path(__file__).parent
START, END = "<!-- tables: python benchmarks/tables.py -->", "<!-- end of tables -->"
# What there is to measure, the folder of its results, and how; each on a CPU and on a GPU.
RUNS = (
    ("attention", "results", "vitrify bench attention"),
    ("shift", "results", "vitrify bench shift"),
    ("hamming", "results", "vitrify bench hamming"),
    ("mixture", "results", "vitrify bench mixture"),
    ("models", "results", "vitrify bench models"),
    (
        "models",
        "results/shift_int8",
        "vitrify bench models --models vit_base_patch16_224:224 --recipe examples/shift_int8.yaml --runtimes",
    ),
)
GPU_FLAGS = "--dtype bfloat16 --compile"


def main() -> None:
    """Replace what stands between the two marks of README.md."""
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{tables(HERE)}\n{END}{after}", encoding="utf-8")


def tables(folder: Path) -> str:
    """Return every table: one per benchmark and machine that has results, and a line for each that is not measured."""
    parts = []
    for benchmark, where, command in RUNS:
        results = [json.loads(path.read_text()) for path in sorted((folder / where).glob(f"{benchmark}-*.json"))]
        on_gpu = [result["machine"]["device"].startswith("cuda") for result in results]
        parts += [table(result) for result in results]
        for kind, measured in (("CPU", not all(on_gpu)), ("GPU", any(on_gpu))):
            if not measured:
                flags = f" {GPU_FLAGS}" if kind == "GPU" and benchmark != "models" else ""
                parts.append(
                    f"### {benchmark}, {kind}\n\n`{command}{flags} --output benchmarks/{where}`: not measured.\n"
                )
    return "\n".join(parts)


def table(result: dict[str, Any]) -> str:
    """Return one result as Markdown: medians, speed-ups, floors, and who was refused or not to be had."""
    machine = result["machine"]
    where = machine["gpu"] if machine["device"].startswith("cuda") else f"{machine['cpu']}, {machine['cores']} cores"
    cases = [row["case"] for row in result["rows"]]
    varying = [key for key in cases[0] if len({str(case[key]) for case in cases}) > 1]
    head = [*varying, "contender", "median ms", "10 % to 90 %", "speed-up", "floor ms", "of the roofline"]
    lines = [
        f"### {result['benchmark']}, {where}\n",
        f"`{result['command']}`  ",
        f"torch {machine['versions']['torch']}, {machine['threads']} threads, {machine['isa']}, load "
        f"{machine['load_average']:.1f} before the start, {machine['date']}\n",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
    ]
    lines += [
        f"| {' | '.join([*(str(row['case'][key]) for key in varying), *_cells(row)])} |" for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    timing, speedup, floor = row["timing"], row["speedup"], row["floor_ms"]
    if timing is None:
        absent = row.get("not_run")  # files from before there was such a thing have none
        return [row["contender"], f"not run: {absent}" if absent else f"refused: {row['refused']}", "", "", "", ""]
    return [
        row["contender"],
        milliseconds(timing["median_ms"]),
        f"{milliseconds(timing['p10_ms'])} to {milliseconds(timing['p90_ms'])}",
        f"{speedup['ratio']:.2f}x, {speedup['verdict']}" if speedup else "",
        milliseconds(floor),
        f"{100 * floor / timing['median_ms']:.0f} %",
    ]


if __name__ == "__main__":
    main()
