"""DeiT-Tiny on one CPU core: PyTorch eager against TVM, original and converted. Writes tvm-deit-<machine>.json here.

    python experiments/latency/tvm_deit.py        # needs the extra `tvm`; about 5 minutes on an idle core

Weights are random. Each library is compared with PyTorch by `export_tvm` before it is timed; contenders take turns.
"""

import os

os.environ["TVM_NUM_THREADS"] = "1"  # read when TVM is loaded

import copy
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import tvm
from tvm import relax

from vitrify import convert_, create_model, export_tvm, pack_, recipes
from vitrify.bench.machine import describe

MODEL, SEED, ROUNDS, INPUTS = "deit_tiny_patch16_224", 0, 15, 4
HERE = Path(__file__).parent


def library(model, folder, name):
    file = folder / f"{name}.so"
    error = export_tvm(model, file)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(file)), tvm.cpu())
    return (lambda images: machine["main"](tvm.runtime.tensor(images.numpy()))), error, file.stat().st_size


def main():
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    machine = describe()
    original = create_model(MODEL).eval()
    converted = copy.deepcopy(original)
    convert_(converted, recipes.shiftaddvit())
    pack_(converted)
    rows, contenders = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("original", original), ("shiftaddvit", converted)):
            contenders[f"{name}, PyTorch eager"] = model
            rows[f"{name}, PyTorch eager"] = {}
            run, error, size = library(model, Path(folder), name)
            contenders[f"{name}, TVM"] = run
            rows[f"{name}, TVM"] = {"error": error, "library_bytes": size}
        times = {name: [] for name in contenders}
        inputs = [torch.randn(1, 3, 224, 224) for _ in range(INPUTS)]
        with torch.inference_mode():
            for number in range(ROUNDS + 2):
                for name, run in contenders.items():
                    start = time.perf_counter()
                    run(inputs[number % INPUTS])
                    if number >= 2:
                        times[name].append((time.perf_counter() - start) * 1e3)
    for name, row in rows.items():
        row |= {"median_ms": statistics.median(times[name]), "min_ms": min(times[name]), "max_ms": max(times[name])}
        print(f"{name:28} {row['median_ms']:7.1f} ms   ({row['min_ms']:.1f} to {row['max_ms']:.1f})")
    # Other work on the cores makes every time here worth little.
    busy = max(machine.load_average, os.getloadavg()[0] - 1) > machine.cores / 2
    record = {"model": MODEL, "batch": 1, "seed": SEED, "rounds": ROUNDS, "provisional": busy, "tvm": tvm.__version__}
    record |= {"machine": dataclasses.asdict(machine), "rows": rows}
    (HERE / f"tvm-deit-{machine.slug}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
