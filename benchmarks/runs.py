"""What there is to measure, and where its results go. `python benchmarks/runs.py` measures on a GPU what is missing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from vitrify.bench import describe, mixture, shift

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One `vitrify bench` and the folder, beside this file, that its result is written into."""

    benchmark: str
    where: str
    options: str = ""

    @property
    def command(self) -> str:
        """What to type in the repository's root."""
        words = ("vitrify bench", self.benchmark, self.options, "--output", f"benchmarks/{self.where}")
        return " ".join(word for word in words if word)


CPU = (
    Run("attention", "results"),
    Run("shift", "results"),
    Run("hamming", "results"),
    Run("mixture", "results"),
    Run("models", "results"),
    Run(
        "models",
        "results/shift_int8",
        "--models vit_base_patch16_224:224 --recipe examples/shift_int8.yaml --runtimes",
    ),
)

OPERATOR = "--dtype bfloat16 --compile"
TOKENS = "--tokens 197,577,1024,4096,16384"
MODELS = (
    *(("vit_base_patch16_224", size) for size in (1024, 512)),
    *((f"deit_{size}_patch16_224", 224) for size in ("base", "small", "tiny")),
    *((f"pvt_v2_b{size}", 224) for size in (0, 1, 2)),
)


def _attention() -> list[Run]:
    widths = {"768": "", "1024": "--heads 16 ", "384": "--heads 6 "}  # heads of 64, 12 of them by default
    passes = {"": "", "_backward": "--backward "}
    return [
        Run("attention", f"results/attention/{width}{suffix}", f"{TOKENS} {heads}{backward}{OPERATOR}")
        for width, heads in widths.items()
        for suffix, backward in passes.items()
    ]


def _shift() -> list[Run]:
    layers = {f"{a}x{b}": [(rows, *way) for way in ((a, b), (b, a)) for rows in shift.ROWS] for a, b in shift.MLPS}
    layers["published"] = list(shift.PUBLISHED)
    return [
        Run("shift", f"results/shift/{name}", f"--shapes {','.join('x'.join(map(str, s)) for s in shapes)} {OPERATOR}")
        for name, shapes in layers.items()
    ]


def _mixture() -> list[Run]:
    layers: dict[str, list[str]] = {}
    for rows, a, b, split in mixture.FULL:
        layers.setdefault(f"{min(a, b)}x{max(a, b)}/{rows}_rows", []).append(f"{rows}x{a}x{b}:{split:g}")
    return [
        Run("mixture", f"results/mixture/{name}", f"--shapes {','.join(shapes)} {OPERATOR}")
        for name, shapes in layers.items()
    ]


def _models() -> list[Run]:
    recipes = {"taylor": "", "taylor_shift_float8": "--recipe benchmarks/taylor_shift_float8.yaml "}
    return [
        Run(
            "models",
            f"results/models/{recipe}/{name}_{size}px_batch{batch}",
            f"--models {name}:{size} {option}--batch-size {batch} --runtimes --compile",
        )
        for name, size in MODELS
        for recipe, option in recipes.items()
        for batch in (1, 32)
    ]


# One of each kind that has a goal, and every width and size that has one: in this order, as time on a GPU may run out.
FIRST = (
    "results/attention/768",
    "results/shift/768x3072",
    "results/mixture/768x3072/12608_rows",
    "results/models/taylor/vit_base_patch16_224_1024px_batch1",
)
GOALS = ("attention", "768x3072", "vit_base")


def _rank(run: Run) -> int:
    if run.where in FIRST:
        return FIRST.index(run.where)
    # Those of the Hamming kernels take seconds.
    return len(FIRST) + (run.benchmark != "hamming" and not any(goal in run.where for goal in GOALS))


# Each takes minutes: whoever stops early loses one of them.
GPU = tuple(sorted([*_attention(), *_shift(), Run("hamming", "results", OPERATOR), *_mixture(), *_models()], key=_rank))


def missing(folder: Path, slug: str) -> list[Run]:
    """Return the GPU runs that have no result in `folder` of the machine with this slug."""
    return [run for run in GPU if not (folder / run.where / f"{run.benchmark}-{slug}.json").exists()]


def main() -> int:
    """Measure what is missing, one run after the other; return 1 if one of them failed or refused a contender."""
    if not torch.cuda.is_available():
        print("this machine has no CUDA GPU; on a CPU: make bench", file=sys.stderr)
        return 2
    failed = []
    todo = missing(HERE, describe("cuda").slug)
    for number, run in enumerate(todo, 1):
        print(f"[{number} of {len(todo)}] {run.command}", flush=True)
        command = [sys.executable, "-m", *shlex.split(run.command)]
        if subprocess.run(command, cwd=HERE.parent, check=False).returncode:
            failed.append(run)
    for run in failed:
        print(f"failed, or wrong output refused: {run.command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
