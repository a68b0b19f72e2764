"""Fine-tune the rows of rows.yaml, render what they never saw, and collect PSNR and SSIM.

    python experiments/nvs/run.py                          every row
    python experiments/nvs/run.py --rows softmax vitrify
    python experiments/nvs/run.py --model runs/nvs/gnt     start from another trained model than the shipped one
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
    """Fine-tune a row, then render its held-out views; return whether both succeeded."""
    runs.mkdir(parents=True, exist_ok=True)
    log = runs / f"{name}.log"
    for kind, words in commands(runs, name, model).items():
        every = [*words, *(SMOKE[kind] if smoke else [])]
        print(f"{name}: {shlex.join(['vitrify', *every])}", flush=True)
        if not vitrify(every, log):
            return False
    return True


def commands(runs: Path, name: str, model: str) -> dict[str, list[str]]:
    """Return the vitrify commands of a row: train, and eval on all shipped scenes."""
    row, place = TABLE["rows"][name], str((runs / name).relative_to(ROOT))
    recipe = str(HERE.relative_to(ROOT) / row["recipe"]) if row["recipe"].endswith(".yaml") else row["recipe"]
    sources = ["--sources", TABLE["sources"]]
    train = ["nvs", "train", model, "--recipe", recipe, "--output", place, *sources, *TABLE["common"]]
    scenes = [word for names in scene_names().values() for scene in names for word in ("--scene", scene)]
    found = {
        "train": [*train, *row.get("options", [])],
        "eval": ["nvs", "eval", place, "--output", f"{place}/views", *sources, *scenes],
    }
    return {kind: [str(word) for word in words] for kind, words in found.items()}


def scene_names() -> dict[str, list[str]]:
    """Return the names of the shipped scenes: held out entirely, and trained on."""
    return {
        "held-out scenes": [scene.name for scene in shipped_scenes("held_out")],
        "held-out views": [scene.name for scene in shipped_scenes("train")],
    }


def collect(runs: Path, model: str) -> dict[str, Any]:
    """Return what the runs on disk say: PSNR and SSIM of each row, and its difference to the baseline."""
    rows: dict[str, Any] = {}
    trivial: dict[str, Any] = {}
    for name, row in TABLE["rows"].items():
        file = runs / name / "views" / "results.json"
        if not file.is_file():
            continue
        records = json.loads(file.read_text())["views"]
        groups = {
            group: summary([record for record in records if record["scene"] in names])
            for group, names in scene_names().items()
        }
        shown = [shlex.join(["vitrify", *words]) for words in commands(runs, name, model).values()]
        rows[name] = {"what": row["what"], "commands": shown}
        rows[name] |= {group: found["model"] for group, found in groups.items()}
        trivial = {name: {group: found[name] for group, found in groups.items()} for name in BASELINES}
        rows[name]["by_view"] = {
            f"{record['scene']}/{record['view']}": round(record["psnr"], 3)
            for record in records
            if record["renderer"] == "model"
        }
    for row in rows.values():
        row["difference"] = difference(row["by_view"], rows.get("softmax", {}).get("by_view", {}))
    return {"machine": dataclasses.asdict(describe()), "trivial": trivial, "rows": rows}


def difference(psnr: dict[str, float], baseline: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return, for both groups of scenes, the mean paired difference in dB over views, and its standard error."""
    found = {}
    for group, names in scene_names().items():
        gaps = [
            value - baseline[view] for view, value in psnr.items() if view.split("/")[0] in names and view in baseline
        ]
        if gaps:
            error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
            found[group] = {"db": statistics.mean(gaps), "standard_error": error, "views": len(gaps)}
    return found


def render(results: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    groups = list(scene_names())
    head = "".join(f" {group}: PSNR, dB | SSIM | to softmax, dB |" for group in groups)
    lines = [f"| row |{head}", "|---|" + "---|" * (3 * len(groups))]
    shown = [*((name, row) for name, row in results["trivial"].items())]
    shown += [(row["what"], row) for row in results["rows"].values()]
    for title, row in shown:
        cells = []
        for group in groups:
            found, gap = row[group], row.get("difference", {}).get(group)
            against = "" if gap is None else f"{gap['db']:+.2f} ± {gap['standard_error']:.2f}"
            cells += [f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", against]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
