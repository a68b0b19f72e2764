"""Recover an encoder without labels, on photographs of solar cells (elpv-dataset, 2,624 images of 300 x 300).

    pip install elpv-dataset
    python experiments/vitality/elpv.py

Trains timm's `test_vit` (depth 6, width 64) at 224 px (196 patches and a class token) to tell working cells from
defective ones, converts it to Taylor attention, recovers it from the same photographs without their labels, and
compares tokens and neighbours with the original on held-out cells, before and after. Writes elpv.json.
The photographs are CC BY-NC-SA 4.0 (Buerhop-Lutz et al., 2018): they are used here and not distributed.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
import shutil
import sys
from importlib import resources
from pathlib import Path

from vitrify.bench.machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from grid import ROOT, vitrify

HERE = Path(__file__).parent
RUNS = ROOT / "runs" / "elpv"
EPOCHS = {"original": 24, "recovered": 8}


def main() -> None:
    images = RUNS / "images"
    if not images.is_dir():
        lay_out(images)
    original, zero_shot, recovered = RUNS / "original", RUNS / "zero_shot", RUNS / "recovered"
    shape = ["--img-size", 224, "--in-chans", 1, "--num-classes", 2]
    common = ["--batch-size", 32, "--amp", "bf16", "--num-workers", 1]
    commands = {
        "train": ["finetune", "test_vit", *shape, "--recipe", "softmax", "--data", images / "labelled",
                  "--epochs", EPOCHS["original"], "--lr", 1e-3, *common, "--output", original],
        "convert": ["convert", original / "model", "--recipe", "taylor", "--output", zero_shot],
        "recover": ["finetune", original / "model", "--recipe", "taylor", "--objective", "features",
                    "--teacher", original / "model", "--data", images / "unlabelled",
                    "--epochs", EPOCHS["recovered"], "--lr", 5e-4, *common, "--output", recovered],
    }  # fmt: skip
    compared = {"before": zero_shot, "after": recovered / "model"}
    for name, artefact in compared.items():
        commands[name] = ["eval", artefact, "--data", images / "labelled", "--split", "val",
                          "--against", original / "model", "--json", RUNS / f"{name}.json"]  # fmt: skip
    for name, words in commands.items():
        text = [str(word) for word in words]
        print(f"vitrify {shlex.join(text)}", flush=True)
        if not vitrify(text, RUNS / "log.txt", threads=2):
            raise SystemExit(f"{name} failed: see {RUNS / 'log.txt'}")
    results = {
        "machine": dataclasses.asdict(describe()),
        "commands": [f"vitrify {shlex.join(str(w).replace(f'{ROOT}/', '') for w in c)}" for c in commands.values()],
        **{name: json.loads((RUNS / f"{name}.json").read_text()) for name in compared},
    }
    text = json.dumps(results, indent=2).replace(f"{ROOT}/", "")
    (HERE / "elpv.json").write_text(text + "\n")
    print(json.dumps({name: results[name] for name in compared}, indent=2))


def lay_out(folder: Path) -> None:
    """Copy the photographs into an image folder: every fifth is held out; also a flat folder without labels."""
    data = Path(str(resources.files("elpv_dataset"))) / "data"
    for index, row in enumerate(
        csv.reader((data / "labels.csv").read_text().splitlines(), delimiter=" ", skipinitialspace=True)
    ):
        path, probability = data / row[0], float(row[1])
        split = "val" if index % 5 == 4 else "train"
        places = [folder / "labelled" / split / ("defective" if probability > 0 else "working")]
        places += [folder / "unlabelled"] if split == "train" else []
        for place in places:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


if __name__ == "__main__":
    main()
