"""The share of attention logits in [-1, 1) in each layer of the shipped ViT, with and without centring the keys.

    python experiments/vitality/logits.py [--images 512]

Writes logits.json. The images are the first of Fashion-MNIST's test set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Subset

import vitrify
from vitrify.artefact import input_config
from vitrify.bench.machine import describe
from vitrify.data import build_transform, load_dataset
from vitrify.report.capture import logit_histograms

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    args = parser.parse_args()

    model = vitrify.create_model("vit_mini_patch2_28", pretrained=True).eval()
    vitrify.convert_(model, vitrify.recipes.softmax())  # changes nothing, but lets the cores be observed
    transform = build_transform(**input_config(model), train=False)
    dataset = load_dataset("fashion-mnist", "test", transform=transform)
    loader = DataLoader(Subset(dataset, range(args.images)), batch_size=64)
    histograms = logit_histograms(model, (images for images, _ in loader))

    shares = {h.name: {"as_is": round(h.raw_share, 4), "centred": round(h.centred_share, 4)} for h in histograms}
    result = {"data": dataset.source, "images": args.images, "share_in_[-1,1)": shares}
    result["machine"] = dataclasses.asdict(describe())
    (HERE / "logits.json").write_text(json.dumps(result, indent=2) + "\n")
    print("| layer | share in [-1, 1) | after centring |\n|---|---|---|")
    for name, share in shares.items():
        print(f"| {name} | {share['as_is']:.1%} | {share['centred']:.1%} |")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
