"""Does the router send object tokens to multiplication, as the paper's Fig. 9 suggests?

    python experiments/shiftaddvit/routing.py [--images 1000]

For the trained rows with mixtures: the share of tokens that multiply among patches of the object and of the empty
background (Fashion-MNIST's background is 0), on the first test images. Writes routing.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

import vitrify
from vitrify.artefact import input_config
from vitrify.bench.machine import describe
from vitrify.data import build_transform, load_dataset
from vitrify.report.primitives import dispatch_maps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grid import ROOT

HERE = Path(__file__).parent
ROWS = ("mixture", "mixture_smooth", "mixture_unbalanced", "shiftaddvit", "vitrify")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()

    folders = {name: ROOT / "runs" / "shiftaddvit" / f"{name}-s0" / "model" for name in ROWS}
    rows = {}
    for name, folder in folders.items():
        if not folder.is_dir():
            print(f"{name}: not run yet")
            continue
        model = vitrify.load(folder)
        config = input_config(model)
        test = load_dataset("fashion-mnist", "test", transform=build_transform(**config, train=False))
        # What a pixel of 0 becomes: the darkest value there is.
        black = -config["mean"][0] / config["std"][0]
        counts: dict[str, torch.Tensor] = {}
        for images, _ in DataLoader(Subset(test, range(args.images)), batch_size=100):
            maps = dispatch_maps(model, images)
            size = next(iter(maps.values())).shape[1:]
            is_object = F.adaptive_max_pool2d(images, size)[:, 0] > black + 1e-3
            for layer, multiplied in maps.items():
                found = [
                    (multiplied & is_object).sum(),
                    is_object.sum(),
                    (multiplied & ~is_object).sum(),
                    (~is_object).sum(),
                ]
                counts[layer] = counts.get(layer, 0) + torch.stack(found)
        rows[name] = {
            layer: {"object": round((c[0] / c[1]).item(), 4), "background": round((c[2] / c[3]).item(), 4)}
            for layer, c in counts.items()
        }
        print(name, rows[name])
    result = {"data": test.source, "images": args.images, "multiplied": rows, "machine": dataclasses.asdict(describe())}
    (HERE / "routing.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
