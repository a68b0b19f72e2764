"""Fine-tune the rows of rows.yaml, render what they never saw, and collect PSNR and SSIM.

    python experiments/nvs/run.py                          every row
    python experiments/nvs/run.py --rows softmax vitrify
    python experiments/nvs/run.py --model runs/nvs/gnt     start from another trained model than base
    python experiments/nvs/run.py --smoke                  two steps, one view a scene: does it run?
    python experiments/nvs/run.py --collect                only rebuild results.json from runs/

Finished runs and pictures are not repeated, and stopped ones resume. Each row gets one thread; --jobs go side by side.
Latency, multiplications and energy are in cost.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from grid import vitrify  # noqa: E402

from vitrify.bench.machine import describe  # noqa: E402
from vitrify.nvs.evaluate import BASELINES, summary  # noqa: E402
from vitrify.nvs.scenes_io import shipped_scenes  # noqa: E402

TABLE: dict[str, Any] = yaml.safe_load((HERE / "rows.yaml").read_text())
SMOKE = {"train": ["--steps", "2", "--rays", "16"], "eval": ["--limit", "1", "--shrink", "3"]}
Views = dict[str, dict[str, float]]
NEW_SCENES, TRAINED, ONE_SCENE = "new scenes", "trained scenes", "one scene"
# Pictures take most of an evaluation's time: two of each of the ten trained scenes say enough.
LIMIT = {NEW_SCENES: [], TRAINED: ["--limit", 2], ONE_SCENE: []}
TITLES = {
    NEW_SCENES: "Scenes that no model was trained on, all their held-out views",
    TRAINED: "Two held-out views of each scene that the models were trained on together",
    ONE_SCENE: "Each row trained on, on one new scene alone: its held-out views",
}


def main() -> None:
    """Run the command line described above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="default: all")
    parser.add_argument("--model", default=TABLE["model"], help="a trained GNT")
    parser.add_argument("--jobs", type=int, default=2, help="rows side by side")
    parser.add_argument("--smoke", action="store_true", help="a quick pass through everything")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := set(args.rows or ()) - TABLE["rows"].keys():
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(TABLE['rows'])}")
    runs = ROOT / "runs" / ("nvs-smoke" if args.smoke else "nvs")
    if not args.collect:
        rows = args.rows or list(TABLE["rows"])
        with ThreadPoolExecutor(args.jobs) as pool:
            done = list(pool.map(lambda name: run(runs, name, args.model, smoke=args.smoke), rows))
        if failed := [name for name, ok in zip(rows, done, strict=True) if not ok]:
            sys.exit(f"failed: {', '.join(failed)} (see the logs in {runs})")
    results = collect(runs, args.model)
    if not args.smoke:
        (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(render(results))


def run(runs: Path, name: str, model: str, *, smoke: bool) -> bool:
    """Fine-tune a row, render its held-out views, and the same on scenes of its own; return whether all succeeded."""
    runs.mkdir(parents=True, exist_ok=True)
    log = runs / f"{name}.log"
    for words in commands(runs, name, model):
        every = [*words, *(SMOKE[words[1]] if smoke else [])]
        print(f"{name}: {shlex.join(['vitrify', *every])}", flush=True)
        if not vitrify(every, log):
            return False
    return True


def commands(runs: Path, name: str, model: str) -> list[list[str]]:
    """Return the vitrify commands of a row, in order: train and eval on all scenes, then on each scene of its own."""
    row, place, alone = TABLE["rows"][name], str((runs / name).relative_to(ROOT)), TABLE["one_scene"]
    recipe = str(HERE.relative_to(ROOT) / row["recipe"]) if row["recipe"].endswith(".yaml") else row["recipe"]
    common = [*TABLE["common"], "--sources", TABLE["sources"]]
    converted = ["--recipe", recipe, *row.get("options", [])]
    found = [["train", model, *converted, "--output", place, "--steps", TABLE["steps"], *common]]
    found += [evaluation(place, group, scenes) for group, scenes in groups().items()]
    for scene in alone["scenes"] if name in alone["rows"] else []:
        found += [
            ["train", place, "--scene", scene, "--output", f"{place}-{scene}", "--steps", alone["steps"], *common],
            evaluation(f"{place}-{scene}", ONE_SCENE, [scene]),
        ]
    return [["nvs", *map(str, words)] for words in found]


def evaluation(place: str, group: str, scenes: list[str]) -> list[Any]:
    """Return the words of the command that renders the held-out views of scenes."""
    chosen = [word for scene in scenes for word in ("--scene", scene)]
    return ["eval", place, "--output", f"{place}/{slug(group)}", "--sources", TABLE["sources"], *chosen, *LIMIT[group]]


def slug(group: str) -> str:
    """Return the folder of a group's pictures."""
    return group.replace(" ", "-")


def groups() -> dict[str, list[str]]:
    """Return the names of the shipped scenes: held out entirely, and trained on."""
    return {
        NEW_SCENES: [scene.name for scene in shipped_scenes("held_out")],
        TRAINED: [scene.name for scene in shipped_scenes("train")],
    }


def collect(runs: Path, model: str) -> dict[str, Any]:
    """Return what the runs on disk say: PSNR and SSIM of each row, and its difference to the baseline."""
    rows: dict[str, Any] = {}
    trivial: dict[str, Any] = {}
    for name, row in TABLE["rows"].items():
        records = {
            group: [
                record
                for file in sorted(runs.glob(f"{name}{suffix}/{slug(group)}/results.json"))
                for record in json.loads(file.read_text())["views"]
            ]
            for group, suffix in ((NEW_SCENES, ""), (TRAINED, ""), (ONE_SCENE, "-*"))
        }
        means = {group: summary(found) for group, found in records.items() if found}
        if not means:
            continue
        shown = [shlex.join(["vitrify", *words]) for words in commands(runs, name, model)]
        rows[name] = {"what": row["what"], "commands": shown}
        rows[name] |= {group: found["model"] for group, found in means.items()}
        rows[name]["by_view"] = {
            group: {
                f"{record['scene']}/{record['view']}": round(record["psnr"], 3)
                for record in found
                if record["renderer"] == "model"
            }
            for group, found in records.items()
            if found
        }
        for baseline in BASELINES:
            trivial[baseline] = {**trivial.get(baseline, {}), **{group: means[group][baseline] for group in means}}
    for row in rows.values():
        row["difference"] = difference(row["by_view"], rows.get("softmax", {}).get("by_view", {}))
    return {"machine": dataclasses.asdict(describe()), "trivial": trivial, "rows": rows}


def difference(psnr: Views, baseline: Views) -> dict[str, dict[str, float]]:
    """Return, for each group, the mean paired difference in dB over views, and its standard error."""
    found = {}
    for group, views in psnr.items():
        gaps = [value - baseline[group][view] for view, value in views.items() if view in baseline.get(group, {})]
        if gaps:
            error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            found[group] = {"db": statistics.mean(gaps), "standard_error": error, "views": len(gaps)}
    return found


def render(results: dict[str, Any]) -> str:
    """Return a table for each group as Markdown."""
    lines = []
    for group, title in TITLES.items():
        lines += [f"\n{title}:\n", "| row | PSNR, dB | SSIM | to softmax, dB |", "|---|---|---|---|"]
        shown = [*results["trivial"].items(), *((row["what"], row) for row in results["rows"].values())]
        for what, row in shown:
            if group in row:
                gap = row.get("difference", {}).get(group)
                against = "" if gap is None else f"{gap['db']:+.2f} ± {gap['standard_error']:.2f}"
                lines.append(f"| {what} | {row[group]['psnr']:.2f} | {row[group]['ssim']:.3f} | {against} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
