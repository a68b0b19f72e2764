"""Does the roofline rank recipes as a stopwatch does? Fits its free parameters on three models, judges three others.

    python experiments/roofline/run.py                     # about 5 minutes on an idle machine, one thread
    python experiments/roofline/run.py --again             # measure anew
    python experiments/roofline/run.py --update-target     # also write the fitted target "cpu" of the package

Each model's recipes are timed in turns, in seconds of the one thread's CPU time, which on an idle machine are seconds.
results.json is written after each model; what is in it is not measured again: a stopped script goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from fit import BASE, START, Terms, fit, judge, target_yaml
from torch import nn

import vitrify
from vitrify import bench
from vitrify.bench.models import build
from vitrify.bench.timing import MIN_ROUNDS, Timing, speedup
from vitrify.convert import AttentionSpec, LinearSpec, Recipe, pack_
from vitrify.cost import probe
from vitrify.files import write_atomically
from vitrify.nn import Mixture

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
FIT = [("deit_tiny_patch16_224", 384), ("pvt_v2_b0", 224), ("levit_128s", 224)]
JUDGE = [("deit_small_patch16_224", 384), ("pvt_v2_b1", 224), ("mobilevit_xs", 256)]
SECONDS = 20.0
SHIFT8 = LinearSpec("shift", activations="int8")
RECIPES = {
    "taylor": vitrify.recipes.taylor(),
    "hamming": Recipe("hamming", AttentionSpec("hamming", bias="drop")),
    "shift": Recipe("shift", projections=LinearSpec("shift"), mlp=LinearSpec("shift")),
    "shift8": Recipe("shift8", projections=SHIFT8, mlp=SHIFT8),
    "shiftaddvit": vitrify.recipes.shiftaddvit(),
    "vitrify": vitrify.recipes.vitrify(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure anew")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each model")
    parser.add_argument("--update-target", action="store_true", help="write src/vitrify/cost/targets/cpu.yaml")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {} if arguments.again or not RESULTS.exists() else json.loads(RESULTS.read_text())
    device = torch.device("cpu")
    if "machine" not in results:
        machine = bench.describe(device)
        results["machine"] = vars(machine)
        results["seconds"] = arguments.seconds
        results["probe"] = probe.measure(device, title=f"{machine.cpu}, one thread", machine=machine.slug)
        results["rows"] = []
    for name, size in [*FIT, *JUDGE]:
        if not any(row["model"] == name for row in results["rows"]):
            begin = time.perf_counter()
            results["rows"] += measure(name, size, arguments.seconds)
            print(f"{name} at {size} px: {time.perf_counter() - begin:.0f} s")
            save(results)
    # The machine may have been busy the first time; a probe can only be too slow.
    again = probe.measure(device, title=results["probe"]["title"], machine=results["probe"]["machine"])
    results["probe"] = better(results["probe"], again)
    fit_rows, judged = ([row for row in results["rows"] if row["model"] in dict(names)] for names in (FIT, JUDGE))
    terms = {(row["model"], row["recipe"]): Terms.of(workload_of(row), results["probe"]) for row in results["rows"]}
    results["before"] = judge(judged, terms, START)
    results["fitted"] = fit(fit_rows, terms)
    results["of_the_fit"] = judge(fit_rows, terms, results["fitted"])
    results["judged"] = judge(judged, terms, results["fitted"])
    save(results)
    report(results)
    if arguments.update_target:
        write_atomically(BASE, target_yaml(results))
        print(f"written: {BASE}")


def measure(name: str, size: int, seconds: float) -> list[dict[str, Any]]:
    """Time the original and each recipe's deployed form in turns, and return a row for each."""
    models = {recipe: deployed(name, size, recipe) for recipe in ("original", *RECIPES)}
    inputs = [torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def forward(model: nn.Module) -> Any:
        def run(images: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return model(images)

        return run

    samples = in_turns({k: forward(m) for k, m in models.items()}, inputs, seconds)
    rows = []
    for recipe, model in models.items():
        compared = None if recipe == "original" else speedup(samples["original"], samples[recipe]).to_dict()
        rows.append(
            {
                "model": name,
                "image_size": size,
                "recipe": recipe,
                "timing": vars(Timing.of(samples[recipe])),
                "speedup": compared,
                "share": share(model),
            }
        )
    return rows


def in_turns(runs: dict[str, Any], inputs: list[torch.Tensor], seconds: float) -> dict[str, list[float]]:
    """Return milliseconds of CPU time of each call; the order and the inputs rotate, as in bench's `interleave`.

    That one measures what passes on the wall's clock, which other processes on the machine move, too.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(inputs[0])
    begin, turn, names = time.thread_time(), 0, list(runs)
    while turn < MIN_ROUNDS or time.thread_time() - begin < seconds:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = time.thread_time()
            runs[name](inputs[turn % len(inputs)])
            samples[name].append((time.thread_time() - start) * 1e3)
        turn += 1
    return samples


def deployed(name: str, size: int, recipe: str, *, meta: bool = False) -> nn.Module:
    """Return the model as it would be served: converted, its shift weights packed."""
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = build(name, size).eval().requires_grad_(False)
    if recipe != "original":
        model = copy.deepcopy(model)
        vitrify.convert_(model, RECIPES[recipe], input_size=(3, size, size))
        if not meta:
            pack_(model)
    return model


def share(model: nn.Module) -> float | None:
    """Return the part of the tokens that was multiplied, on average over the mixtures of a model that has run."""
    shares = [module.share[0].item() for module in model.modules() if isinstance(module, Mixture)]
    return sum(shares) / len(shares) if shares else None


def workload_of(row: dict[str, Any]) -> vitrify.Workload:
    """Trace the model of a row, with the tokens split as they were when it was timed."""
    model = deployed(row["model"], row["image_size"], row["recipe"], meta=True)
    split = None if row["share"] is None else {"multiply": row["share"], "shift": 1 - row["share"]}
    return vitrify.workload(model, (3, row["image_size"], row["image_size"]), split=split)


def better(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the higher of two probes' rates, and the lower of their times."""
    for section in ("peak", "vector", "bandwidth", "launch"):
        pick = min if section == "launch" else max
        for key, entry in first[section].items():
            entry["value"] = pick(entry["value"], second[section][key]["value"])
    return first


def save(results: dict[str, Any]) -> None:
    write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")


def report(results: dict[str, Any]) -> None:
    print("fitted:", ", ".join(f"{key} {value:.3g}" for key, value in results["fitted"].items()))
    for title, part in (("before the fit", "before"), ("fitted on", "of_the_fit"), ("judged on", "judged")):
        verdict = results[part]
        times, median, largest = (100 * verdict[name] for name in ("time_error", "saving_error", "saving_error_max"))
        print(f"\n{title}: median error of a time {times:.0f} %, of a saving {median:.1f} points")
        print(f"largest error of what was computed to save: {largest:.1f} points")
        for model in verdict["models"]:
            print(
                f"  {model['model']}: Spearman {model['spearman']:.2f}, pairs in the wrong order: "
                f"{', '.join(model['wrong']) or 'none'}"
            )
            for recipe, pair in model["ms"].items():
                print(f"    {recipe:12} measured {pair[0]:8.1f} ms, computed {pair[1]:8.1f} ms")


if __name__ == "__main__":
    main()
