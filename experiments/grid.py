"""Run a table of fine-tuning rows (rows.yaml) through the command line, and collect its results.

    python experiments/<name>/run.py                      every row, seed 0
    python experiments/<name>/run.py --rows softmax taylor --seeds 0 1 2
    python experiments/<name>/run.py --table rows_pvt.yaml another table of that folder
    python experiments/<name>/run.py --collect            only rebuild the results from runs/

Finished runs are not repeated and a stopped one resumes. Each run gets one thread and --jobs of them go side by side,
which is faster on two cores than one run with two threads.

A table has `model` and `common` (options of every row), `rows` (name -> recipe or plan, what, options), and may have
`zero_shot` (name -> recipe, what: converted and tested as they are) and `prepare` (the options of a `vitrify finetune
MODEL` that makes the starting point; then every row starts from its artefact). Recipes and plans are names, or files
beside the table. results.json beside the table (results_pvt.json for rows_pvt.yaml) holds what was measured.
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

ROOT = Path(__file__).resolve().parent.parent
# Student's t, 95 %, two-sided, for the two degrees of freedom of three paired differences.
T_95_DF2 = 4.303


def main(folder: Path) -> None:
    """Run the command line described above for the tables in `folder`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="rows.yaml")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    grid = Grid(folder, args.table)
    if unknown := set(args.rows or ()) - grid.table["rows"].keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(grid.table['rows'])}")
    if not args.collect:
        grid.run(args.rows or list(grid.table["rows"]), args.seeds, args.jobs)
    results = grid.collect()
    grid.results.write_text(json.dumps(results, indent=2) + "\n")
    print(render(results))


class Grid:
    """One table and its runs, in runs/<folder's name> (runs/<folder's name>-pvt for rows_pvt.yaml)."""

    def __init__(self, folder: Path, table: str = "rows.yaml") -> None:
        self.folder = folder.resolve()
        self.table: dict[str, Any] = yaml.safe_load((folder / table).read_text())
        suffix = Path(table).stem.removeprefix("rows").replace("_", "-")
        self.runs = ROOT / "runs" / f"{folder.name}{suffix}"
        self.results = folder / f"results{suffix.replace('-', '_')}.json"
        self.base = self.runs / "base"

    def run(self, rows: list[str], seeds: list[int], jobs: int) -> None:
        """Prepare the starting point, then run the rows; exits naming what failed."""
        self.runs.mkdir(parents=True, exist_ok=True)
        if "prepare" in self.table and not self._vitrify(self.preparation(), "base", threads=jobs):
            sys.exit(f"failed: the starting point (see {self.runs / 'base.log'})")
        for name, row in self.table.get("zero_shot", {}).items():
            self._zero_shot(name, row["recipe"])
        commands = {f"{name}-s{seed}": self.command(name, seed) for seed in seeds for name in rows}
        with ThreadPoolExecutor(jobs) as pool:
            succeeded = list(pool.map(self._run, commands, commands.values()))
        if failed := [name for name, ok in zip(commands, succeeded, strict=True) if not ok]:
            sys.exit(f"failed: {', '.join(failed)} (see the logs in {self.runs})")

    def preparation(self) -> list[str]:
        """Return the vitrify command that makes the starting point."""
        options = [str(word) for word in self.table["prepare"]]
        return ["finetune", self.table["model"], "--output", self._shown(self.base), *options]

    def start(self) -> list[str]:
        """Return MODEL and the options that load its weights."""
        return [self._shown(self.base)] if "prepare" in self.table else [self.table["model"], "--pretrained"]

    def command(self, name: str, seed: int) -> list[str]:
        """Return the vitrify command of a row."""
        row = self.table["rows"][name]
        kind = "plan" if "plan" in row else "recipe"
        model, *weights = self.start()
        words = [
            "finetune",
            model,
            f"--{kind}",
            self._file(row[kind]),
            "--output",
            self._shown(self.runs / f"{name}-s{seed}"),
        ]
        return [str(w) for w in (*words, *weights, *self.table["common"], *row.get("options", []), "--seed", seed)]

    def collect(self) -> dict[str, Any]:
        """Return what the runs on disk say: accuracy and paired difference to softmax by seed, and what was logged."""
        rows: dict[str, Any] = {}
        for name, row in self.table.get("zero_shot", {}).items():
            path = self.runs / f"{name}.json"
            if path.exists():
                accuracy = json.loads(path.read_text())["accuracy"] / 100
                commands = (shlex.join(["vitrify", *words]) for words in self._zero_shot_commands(name, row["recipe"]))
                rows[name] = {"what": row["what"], "command": " && ".join(commands), "top1": {"none": accuracy}}
        for name, row in self.table["rows"].items():
            found = {path.name.rpartition("-s")[2]: path for path in sorted(self.runs.glob(f"{name}-s*/"))}
            done = {seed: measured(path) for seed, path in found.items() if (path / "model").is_dir()}
            if done:
                command = shlex.join(["vitrify", *self.command(name, 0)])
                rows[name] = {"what": row["what"], "command": command}
                for key in ("top1", "density", "share", "bytes"):
                    if values := {seed: result[key] for seed, result in done.items() if key in result}:
                        rows[name][key] = values
        baseline = rows.get("softmax", {}).get("top1", {})
        for row in rows.values():
            row["difference"] = difference(row["top1"], baseline)
        results: dict[str, Any] = {"machine": dataclasses.asdict(describe()), "rows": rows}
        if "prepare" in self.table and (self.base / "model").is_dir():
            command = shlex.join(["vitrify", *self.preparation()])
            results["start"] = {"command": command, "top1": measured(self.base)["top1"]}
        return results

    def _run(self, name: str, words: list[str]) -> bool:
        print(f"{name}: {shlex.join(['vitrify', *words])}", flush=True)
        return self._vitrify(words, name)

    def _zero_shot(self, name: str, recipe: str) -> None:
        if (self.runs / f"{name}.json").exists():
            return
        for words in self._zero_shot_commands(name, recipe):
            if not self._vitrify(words, name):
                sys.exit(f"failed: {name} (see {self.runs / name}.log)")

    def _zero_shot_commands(self, name: str, recipe: str) -> list[list[str]]:
        common = self.table["common"]
        model, *weights = self.start()
        output, result = self._shown(self.runs / name), self._shown(self.runs / f"{name}.json")
        converted = ["convert", model, *weights, "--recipe", self._file(recipe), "--output", output]
        return [converted, ["eval", output, "--data", common[common.index("--data") + 1], "--json", result]]

    def _vitrify(self, words: list[str], name: str, threads: int = 1) -> bool:
        return vitrify(words, self.runs / f"{name}.log", threads)

    def _file(self, name: str) -> str:
        """Return a recipe's or plan's name, or the path of its file from the repository's root."""
        return self._shown(self.folder / name) if name.endswith(".yaml") else name

    @staticmethod
    def _shown(path: Path) -> str:
        return str(path.relative_to(ROOT))


def vitrify(words: list[str], log: Path, threads: int = 1) -> bool:
    """Run one vitrify command from the repository's root and return whether it succeeded; its output goes to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with log.open("a") as file:
        print(f"$ {shlex.join(['vitrify', *words])}", file=file, flush=True)
        command = [sys.executable, "-m", "vitrify", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file, check=False)
    return done.returncode == 0


def measured(run: Path) -> dict[str, Any]:
    """Return what a finished run logged: accuracy, and for the modules that have them, densities and token shares."""
    lines = read_metrics(run / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    train = [line for line in lines if line["kind"] == "train"]
    weights = run / "model" / "model.safetensors"
    result: dict[str, Any] = {"top1": epochs[-1]["eval"]["top1"], "bytes": weights.stat().st_size}
    density = {
        f"{line['epoch']:.2f}": round(statistics.mean(line["density"].values()), 5)
        for line in train
        if "density" in line
    }
    share = {name.removeprefix("share/"): round(v, 4) for name, v in epochs[-1].items() if name.startswith("share/")}
    return result | ({"density": density} if density else {}) | ({"share": share} if share else {})


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
    shares = any("share" in row for row in results["rows"].values())
    head, rule = "| row | top-1, % | seeds | against softmax, points |", "|---|---|---|---|"
    lines = [head + (" tokens multiplied, by layer, % |" if shares else ""), rule + ("---|" if shares else "")]
    for row in results["rows"].values():
        top1 = 100 * statistics.mean(row["top1"].values())
        gap = row["difference"]
        shown = "-" if gap is None else f"{gap['points']:+.2f}" + (f" ± {gap['ci95']:.2f}" if "ci95" in gap else "")
        line = f"| {row['what']} | {top1:.2f} | {len(row['top1'])} | {shown} |"
        if shares:
            first = next(iter(row.get("share", {}).values()), {})
            line += " " + ", ".join(f"{100 * v:.0f}" for k, v in first.items() if k.endswith("multiply")) + " |"
        lines.append(line)
    return "\n".join(lines)
