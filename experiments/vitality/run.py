"""Run the table of experiments/vitality (rows.yaml) through the command line, and collect results.json.

    python experiments/vitality/run.py                      every row, seed 0
    python experiments/vitality/run.py --rows softmax taylor --seeds 0 1 2
    python experiments/vitality/run.py --collect            only rebuild results.json from runs/

Finished runs are not repeated and a stopped one resumes. Each run gets one thread and --jobs of them go side by side,
which is faster on two cores than one run with two threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from vitrify.bench.machine import describe
from vitrify.train import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNS = ROOT / "runs" / "vitality"
MODEL = "vit_mini_patch2_28"
# Student's t, 95 %, two-sided, for the two degrees of freedom of three paired differences.
T_95_DF2 = 4.303


def main() -> None:
    table = yaml.safe_load((HERE / "rows.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(table["rows"]), default=list(table["rows"]))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()

    if not args.collect:
        RUNS.mkdir(parents=True, exist_ok=True)
        for name, row in table["zero_shot"].items():
            zero_shot(name, row["recipe"], table["common"])
        commands = {f"{name}-s{seed}": command(name, table, seed) for seed in args.seeds for name in args.rows}
        with ThreadPoolExecutor(args.jobs) as pool:
            succeeded = list(pool.map(run, commands, commands.values()))
        failed = [name for name, ok in zip(commands, succeeded, strict=True) if not ok]
        if failed:
            sys.exit(f"failed: {', '.join(failed)} (see the logs in {RUNS})")
    results = collect(table)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(render(results))


def command(name: str, table: dict[str, Any], seed: int) -> list[str]:
    """Return the vitrify command of a row."""
    row = table["rows"][name]
    options = [*table["common"], *row.get("options", []), "--seed", seed]
    words = ["finetune", MODEL, "--recipe", recipe(row["recipe"]), "--output", RUNS / f"{name}-s{seed}", *options]
    return [str(word) for word in words]


def recipe(name: str) -> str:
    """Return a recipe's name, or the path of its file from the repository's root."""
    return str((HERE / name).relative_to(ROOT)) if name.endswith(".yaml") else name


def vitrify(words: list[str], log: Path) -> bool:
    """Run one vitrify command with one thread; its output goes to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("a") as file:
        print(f"$ vitrify {shlex.join(words)}", file=file, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "vitrify", *words], cwd=ROOT, env=environment, stdout=file, stderr=file, check=False
        )
    return done.returncode == 0


def run(name: str, words: list[str]) -> bool:
    """Run a row unless it is complete."""
    print(f"{name}: vitrify {shlex.join(words)}", flush=True)
    return vitrify(words, RUNS / f"{name}.log")


def zero_shot(name: str, recipe_name: str, common: list[str]) -> None:
    """Convert, test, and write the accuracy beside the runs."""
    result = RUNS / f"{name}.json"
    if result.exists():
        return
    log, folder = RUNS / f"{name}.log", RUNS / name
    converted = ["convert", MODEL, "--pretrained", "--recipe", recipe(recipe_name), "--output", str(folder)]
    data = common[common.index("--data") + 1]
    tested = ["eval", str(folder), "--data", data, "--json", str(result)]
    if not (vitrify(converted, log) and vitrify(tested, log)):
        sys.exit(f"failed: {name} (see {log})")


def collect(table: dict[str, Any]) -> dict[str, Any]:
    """Return what the runs on disk say: accuracy and paired difference to softmax by seed, densities on the way."""
    rows: dict[str, Any] = {}
    for name, row in table["zero_shot"].items():
        path = RUNS / f"{name}.json"
        if path.exists():
            accuracy = json.loads(path.read_text())["accuracy"] / 100
            convert = f"vitrify convert {MODEL} --pretrained --recipe {recipe(row['recipe'])} --output runs/{name}"
            test = f"vitrify eval runs/{name} --data fashion-mnist"
            rows[name] = {"what": row["what"], "command": f"{convert} && {test}", "top1": {"none": accuracy}}
    for name, row in table["rows"].items():
        top1, density = {}, {}
        for folder in sorted(RUNS.glob(f"{name}-s*/")):
            lines = read_metrics(folder / "metrics.jsonl")
            epochs = [line for line in lines if line["kind"] == "epoch"]
            if not (folder / "model").is_dir() or not epochs:
                continue
            seed = folder.name.rpartition("-s")[2]
            top1[seed] = epochs[-1]["eval"]["top1"]
            density[seed] = {
                f"{line['epoch']:.2f}": round(statistics.mean(line["density"].values()), 5)
                for line in lines
                if line["kind"] == "train" and "density" in line
            }
        if top1:
            first = command(name, table, 0)
            first[first.index("--output") + 1] = f"runs/vitality/{name}-s0"
            rows[name] = {"what": row["what"], "command": f"vitrify {shlex.join(first)}", "top1": top1}
            if any(density.values()):
                rows[name]["density"] = density
    baseline = rows.get("softmax", {}).get("top1", {})
    for row in rows.values():
        row["difference"] = difference(row["top1"], baseline)
    return {"machine": dataclasses.asdict(describe()), "rows": rows}


def difference(top1: dict[str, float], baseline: dict[str, float]) -> dict[str, float] | None:
    """Return the mean paired difference to the baseline in points; with three seeds, its 95 % half-width too."""
    seeds = [seed for seed in top1 if seed in baseline]
    if not seeds:
        return None
    points = [100 * (top1[seed] - baseline[seed]) for seed in seeds]
    result = {"points": statistics.mean(points), "seeds": float(len(points))}
    if len(points) == 3:
        result["ci95"] = T_95_DF2 * statistics.stdev(points) / 3**0.5
    return result


def render(results: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = ["| row | top-1, % | seeds | against softmax, points |", "|---|---|---|---|"]
    for row in results["rows"].values():
        top1 = 100 * statistics.mean(row["top1"].values())
        gap = row["difference"]
        shown = "-" if gap is None else f"{gap['points']:+.2f}" + (f" ± {gap['ci95']:.2f}" if "ci95" in gap else "")
        lines.append(f"| {row['what']} | {top1:.2f} | {len(row['top1'])} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
