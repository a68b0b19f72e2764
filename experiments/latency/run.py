"""ShiftAddViT's "up to 5.18x lower latency on GPUs", by the paper's protocol and like for like.

    python experiments/latency/run.py                        every model and recipe that results/ lacks
    python experiments/latency/run.py --models pvt_v2_b0     these models; --again measures them anew
    python experiments/latency/run.py --report               only print the table of README.md

Runs on the GPU where there is one. Each model takes some minutes, mostly for torch.compile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vitrify.bench.machine import describe

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("deit_tiny_patch16_224", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2")
RECIPES = ("shiftaddvit", "vitrify")


def main() -> int:
    """Measure what is missing; return 1 if a contender was refused, whose place in the table then says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each model and recipe")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    machine = describe("cuda" if torch.cuda.is_available() else "cpu").slug
    failed = []
    for recipe in () if args.report else args.recipes:
        for model in args.models:
            folder = RESULTS / recipe / model
            if args.again or not (folder / f"models-{machine}.json").exists():
                failed += [] if measured(model, recipe, folder, args.seconds) else [f"{model} {recipe}"]
    print(report())
    for name in failed:
        print(f"failed, or wrong output refused: {name}", file=sys.stderr)
    return 1 if failed else 0


def measured(model: str, recipe: str, folder: Path, seconds: float) -> bool:
    """Time the original and its conversion, packed, each eager and compiled: batch 1, float32, 224 px.

    One that fails does not keep the others from being measured.
    """
    words = ["bench", "models", "--models", f"{model}:224", "--recipe", recipe, "--compile"]
    options = ["--seconds", str(seconds), "--output", str(folder)]
    return not subprocess.run([sys.executable, "-m", "vitrify", *words, *options], check=False).returncode


def report() -> str:
    """Return the table: one row for each model, recipe and machine."""
    lines = [
        "| machine | model | recipe | original, eager | original, compiled | recipe, eager | recipe, compiled "
        "| paper's protocol | like for like, eager | like for like, compiled |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*/*/models-*.json")):
        recipe, model = path.parts[-3:-1]
        result = json.loads(path.read_text())
        times = {row["contender"]: row["timing"]["median_ms"] for row in result["rows"] if row["timing"]}
        lines.append(line(result["machine"], model, recipe, times))
    return "\n".join(lines)


def line(machine: dict[str, Any], model: str, recipe: str, times: dict[str, float]) -> str:
    """Return a model's row: milliseconds, and how many times as fast the recipe is."""
    original, compiled = times.get("original"), times.get("original compiled")
    eager, both = times.get(recipe), times.get(f"{recipe} compiled")
    shown = (f"{ms:.1f} ms" if ms else "refused" for ms in (original, compiled, eager, both))
    ratios = (f"{a / b:.2f}x" if a and b else "-" for a, b in ((original, both), (original, eager), (compiled, both)))
    name = machine["gpu"] if machine["device"].startswith("cuda") else f"{machine['cpu']}, {machine['cores']} cores"
    return f"| {name} | {model} | {recipe} | {' | '.join(shown)} | {' | '.join(ratios)} |"


if __name__ == "__main__":
    sys.exit(main())
