"""Train the shipped ViT on Fashion-MNIST and write its weights and their record into the package (`make checkpoint`).

Two stages, the second a warm restart of the cosine schedule (Loshchilov & Hutter, "SGDR", 2017). Uses the full training
set where Debian's package dataset-fashion-mnist is installed. A run that was stopped goes on from its last checkpoint
when the script is called again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

from vitrify import artefact
from vitrify.bench.machine import describe
from vitrify.data import build_transform, load_dataset
from vitrify.models.fashion_vit import WEIGHTS
from vitrify.train import TrainConfig, finetune, make_task, read_metrics

FIRST = TrainConfig(epochs=8, batch_size=32, lr=1.5e-3, warmup_epochs=0.5, amp="bf16", log_every=100)
STAGES = (FIRST, dataclasses.replace(FIRST, epochs=5, lr=1e-3, warmup_epochs=0.25, seed=1))


def main() -> None:
    """Train, then copy the final weights to the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/checkpoint"), help="folder of the runs")
    parser.add_argument("--data", default="fashion-mnist", help="which Fashion-MNIST to train on")
    args = parser.parse_args()

    timm.layers.set_fused_attn(False)  # on a CPU the backward of SDPA takes 3 times as long as plain attention's
    torch.manual_seed(FIRST.seed)
    model = artefact.create_model("vit_mini_patch2_28")
    images = artefact.input_config(model)
    datasets = [
        load_dataset(args.data, split, transform=build_transform(**images, train=split == "train"))
        for split in ("train", "test")
    ]
    folders = [args.output / f"stage{number}" for number in range(1, len(STAGES) + 1)]
    for config, folder in zip(STAGES, folders, strict=True):
        finetune(model, make_task(config, *datasets), config, folder)

    WEIGHTS.parent.mkdir(exist_ok=True)
    # Saved anew without the artefact's metadata: the file is loaded by timm, as any of its checkpoints is.
    save_file(load_file(folders[-1] / "model" / "model.safetensors"), WEIGHTS)
    record = {
        "command": "make checkpoint",
        "data": [dataset.source for dataset in datasets],
        "stages": [stage_record(config, folder) for config, folder in zip(STAGES, folders, strict=True)],
        "machine": dataclasses.asdict(describe()),
    }
    WEIGHTS.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{WEIGHTS}: {record['stages'][-1]['epochs'][-1]}")


def stage_record(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Return the settings and the epochs of one stage."""
    lines = read_metrics(folder / "metrics.jsonl")
    return {"config": config.to_dict(), "epochs": [line for line in lines if line["kind"] == "epoch"]}


if __name__ == "__main__":
    main()
