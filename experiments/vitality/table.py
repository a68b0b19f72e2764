"""Print the tables of README.md from the JSON beside it: `python experiments/vitality/table.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grid import render

HERE = Path(__file__).parent


def main() -> None:
    results = json.loads((HERE / "results.json").read_text())
    print(render(results))
    print("\nDensity of the mask, mean over layers, along the run (share of one pass over the 20,000 images):\n")
    marks = ["start", "half", "end"]
    print(f"| row | {' | '.join(marks)} |\n|---|---|---|---|")
    for row in results["rows"].values():
        for density in list(row.get("density", {}).values())[:1]:
            points = list(density.values())
            shown = [points[0], points[len(points) // 2], points[-1]]
            print(f"| {row['what']} | {' | '.join(f'{value:.4f}' for value in shown)} |")
    elpv = json.loads((HERE / "elpv.json").read_text())
    print("\n| photographs, held out | before | after |\n|---|---|---|")
    for key in elpv["before"]["agreement"]:
        values = [elpv[name]["agreement"][key] for name in ("before", "after")]
        print(f"| {key} | {values[0]:.3f} | {values[1]:.3f} |")
    for key in ("accuracy", "accuracy_original"):
        print(f"| {key}, % | {elpv['before'][key]:.2f} | {elpv['after'][key]:.2f} |")


if __name__ == "__main__":
    main()
