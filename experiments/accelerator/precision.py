"""What a model loses at an accelerator's widths, and the two schedules of Taylor attention in fixed point side by side.

    python experiments/accelerator/precision.py --model runs/vitality/taylor-s0 --model runs/vitality/softmax-s0 ...

Each model is a run folder, an artefact or a name, as `vitrify eval` takes it. Writes results/precision.json beside it
and prints the tables of ops/taylor/README.md: accuracy on Fashion-MNIST's test images, and attention's own error on a
trained model's queries, keys and values.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vitrify.accelerator.quantise import quantise_, widths_of
from vitrify.bench import describe
from vitrify.cli.options import load_model, open_data
from vitrify.files import write_atomically
from vitrify.nn.attention import named_cores
from vitrify.nn.cores import Taylor
from vitrify.ops.taylor import reference
from vitrify.ops.taylor.quantised import SCHEDULES, Algorithm1
from vitrify.ops.taylor.widths import Ranges, Widths

RESULT = Path(__file__).parent / "results" / "precision.json"
PLAIN = widths_of("vitality")
WIDTHS = {"8": PLAIN, "8, G and M of 16": replace(PLAIN, context=16, partial=32)}
CALIBRATION = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": asdict(describe("cpu")), "images": given.images, "models": {}}
    for name in given.model:
        results["models"][name] = measure(name, given.images)
        write_atomically(RESULT, json.dumps(results, indent=2) + "\n")
    print(tables(results))


def measure(name: str, images: int) -> dict[str, Any]:
    model = load_model(name).eval()
    test = open_data("fashion-mnist", "test", model, limit=images)
    train = open_data("fashion-mnist", "train", model, limit=CALIBRATION)
    batch = torch.stack([train[index][0] for index in range(CALIBRATION)])
    labels = torch.tensor([label for _, label in test])
    answers = predict(model, test)
    found: dict[str, Any] = {"float": accuracy(answers, labels), "widths": {}}
    taylor = [core for core in named_cores(model).values() if isinstance(core, Taylor)]
    for form in SCHEDULES if taylor else ["algorithm1"]:
        for bits, widths in WIDTHS.items():
            rounded = copy.deepcopy(model)
            report = quantise_(rounded, widths, [batch], form)
            theirs = predict(rounded, test)
            same = 100 * float((theirs == answers).float().mean())
            found["widths"][f"{form if taylor else 'softmax'}, {bits}"] = {
                "accuracy": accuracy(theirs, labels),
                "same": same,
                "overflows": report.overflows,
            }
    if taylor:
        found["core"] = core_errors(model, batch)
    return found


@torch.no_grad()
def predict(model: nn.Module, data: Any) -> Tensor:
    return torch.cat([model(images).argmax(1) for images, _ in DataLoader(data, 100)])


def accuracy(answers: Tensor, labels: Tensor) -> float:
    return 100 * float((answers == labels).float().mean())


@torch.no_grad()
def core_errors(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """Return for each schedule the rms error of Z over all layers, in units of its last digit; and k^_sum."""
    calls: list[tuple[Tensor, Tensor, Tensor, float]] = []
    hooks = [
        core.register_forward_pre_hook(lambda _, args, how: calls.append((*args[:3], how["scale"])), with_kwargs=True)
        for core in named_cores(model).values()
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    errors: dict[str, float] = {}
    sums = []
    for bits, widths in WIDTHS.items():
        for form in SCHEDULES:
            squares = [error_of(form, widths, *call, sums) for call in calls]
            errors[f"{form}, {bits}"] = (sum(squares) / len(squares)) ** 0.5
    key_sums = torch.cat(sums).double()
    return {
        "error": errors,
        "key_sum": {
            "tokens": calls[0][1].shape[2],
            "zero": 100 * float((key_sums == 0).double().mean()),
            "rms": float(key_sums.square().mean().sqrt()),
            "largest": float(key_sums.abs().max()),
        },
    }


def error_of(
    form: str, widths: Widths, query: Tensor, key: Tensor, value: Tensor, scale: float, sums: list[Tensor]
) -> float:
    """Return the mean square error of Z against float64 on the same codes; note k^_sum at the plain widths."""
    schedule = SCHEDULES[form].of(Ranges.of(query, key, value, scale), key.shape[2], scale, widths)
    codes = schedule.quantise(query, key, value)
    units = schedule.units
    real = [code * unit for code, unit in zip(codes, (units.query, units.key, units.value), strict=True)]
    if isinstance(schedule, Algorithm1) and widths == PLAIN:
        mean = schedule.mean(schedule.sum_tokens(codes[1], "keys"))
        sums.append(schedule.centre_key(codes[1], mean).sum(-2).flatten())
    error = schedule(*codes) - reference.algorithm1(*real, None, scale) / units.output
    return float(error.square().mean())


def tables(results: dict[str, Any]) -> str:
    lines = ["| model | float, % | schedule, bits | accuracy, % | answers as in float, % |", "|---|---|---|---|---|"]
    for name, found in results["models"].items():
        for row, at in found["widths"].items():
            wide = f" ({len(at['overflows'])} layers' sums over their partial bits)" if at["overflows"] else ""
            lines.append(f"| {name} | {found['float']:.2f} | {row}{wide} | {at['accuracy']:.2f} | {at['same']:.2f} |")
    lines += ["", "| model | schedule, bits | rms error of Z, units of its last digit |", "|---|---|---|"]
    for name, found in results["models"].items():
        if core := found.get("core"):
            lines += [f"| {name} | {row} | {error:.3f} |" for row, error in core["error"].items()]
            k = core["key_sum"]
            text = f"k^_sum: 0 in {k['zero']:.1f} % of channels, rms {k['rms']:.0f}, at most {k['largest']:.0f}"
            lines.append(f"| {name} | {text}, of {k['tokens']} tokens | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
