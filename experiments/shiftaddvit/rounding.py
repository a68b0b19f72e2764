"""What rounding the weights costs the shipped ViT before any fine-tuning, and what calibrated rounding wins back.

    python experiments/shiftaddvit/rounding.py [--images 2000]

All projections and MLPs; shift weights of 3 to 6 bits, rounded by log2 of each weight or by the layers' output error on
64 training images, beside integer multiplication. Writes rounding.json.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import vitrify
from vitrify.artefact import input_config
from vitrify.bench.machine import describe
from vitrify.data import build_transform, load_dataset
from vitrify.nn import calibrate_shift_

HERE = Path(__file__).parent
SHIFTS = [(variant, bits) for variant in ("ps", "q") for bits in (3, 4, 5, 6)]
SPECS = {f"shift, {bits} bits, {v}": {"primitive": "shift", "bits": bits, "variant": v} for v, bits in SHIFTS}
SPECS |= {f"integer, {bits} bits": {"primitive": "integer", "bits": bits} for bits in (4, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="of the test set")
    args = parser.parse_args()

    original = vitrify.create_model("vit_mini_patch2_28", pretrained=True).eval()
    transform = build_transform(**input_config(original), train=False)
    test = load_dataset("fashion-mnist", "test", transform=transform)
    train = load_dataset("fashion-mnist", "train", transform=transform)
    images = torch.stack([train[i][0] for i in range(64)])
    subset = Subset(test, range(args.images))

    exact, labels = logits(original, subset)
    rows = {"multiply": measure(exact, exact, labels)}
    for name, spec in SPECS.items():
        model = copy.deepcopy(original)
        vitrify.convert_(model, vitrify.Recipe("all", projections=spec, mlp=spec))
        rows[name] = measure(logits(model, subset)[0], exact, labels)
        if spec["primitive"] == "shift":
            calibrate_shift_(model, images.split(16))
            rows[f"{name}, calibrated"] = measure(logits(model, subset)[0], exact, labels)
        print(name, rows[name], rows.get(f"{name}, calibrated", ""), flush=True)
    result = {"data": test.source, "images": args.images, "rows": rows, "machine": dataclasses.asdict(describe())}
    (HERE / "rounding.json").write_text(json.dumps(result, indent=2) + "\n")


@torch.no_grad()
def logits(model: nn.Module, data: Dataset[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Return the logits and the labels of all images."""
    batches = [(model(images), labels) for images, labels in DataLoader(data, batch_size=100)]
    return torch.cat([out for out, _ in batches]), torch.cat([labels for _, labels in batches])


def measure(out: Tensor, exact: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the top-1 accuracy in % and the relative error of the logits against the multiplying model."""
    error = ((out - exact).norm() / exact.norm()).item()
    return {"top1": 100 * (out.argmax(1) == labels).double().mean().item(), "logit_error": round(error, 4)}


if __name__ == "__main__":
    main()
