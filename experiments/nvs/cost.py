"""What a picture costs, row by row, for the small and the published GNT: products, energy, and time on this machine.

    python experiments/nvs/cost.py                   writes cost.json beside it
    python experiments/nvs/cost.py --sizes gnt_small --rows softmax vitrify --seconds 5

Products and energy are those of the traced graph of one picture of 96 x 72 pixels from 8 source views; a mixture
sends 40 % of its tokens to multiplication, as its latencies ask. Time: the source views are encoded once and the rays
traced in chunks; one chunk of each row is timed, in turns, with shift weights packed, and the picture's time follows
from the number of its chunks. Weights are random, which changes no time but that of mixtures: their routers are moved
to those 40 %.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import vitrify
from vitrify.bench.machine import describe
from vitrify.convert import convert_, pack_
from vitrify.nn import Mixture
from vitrify.nvs import GNT, RayBatch, create, nearest_views
from vitrify.nvs.scenes_io import shipped_scenes
from vitrify.nvs.task import ray_batch

HERE = Path(__file__).resolve().parent
ROWS: dict[str, Any] = yaml.safe_load((HERE / "rows.yaml").read_text())["rows"]
SOURCES = 8
CHUNK = {"gnt_small": 1024, "gnt": 128}
MULTIPLIED = 0.4


def main() -> None:
    """Measure the rows and write cost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [name for name, row in ROWS.items() if "options" not in row]  # other trainings cost the same
    parser.add_argument("--rows", nargs="+", default=rows, metavar="ROW")
    parser.add_argument("--sizes", nargs="+", default=list(CHUNK), metavar="GNT")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timing of all rows of a size")
    parser.add_argument("--output", type=Path, default=HERE / "cost.json")
    args = parser.parse_args()
    batch = one_picture()
    result: dict[str, Any] = {"machine": dataclasses.asdict(describe()), "threads": torch.get_num_threads()}
    for size in args.sizes:
        models = {name: converted(size, ROWS[name]["recipe"], batch) for name in args.rows}
        found = {name: counts(model, batch) for name, model in models.items()}
        for name, seconds in timed(models, batch, CHUNK[size], args.seconds).items():
            found[name] |= {"seconds_per_picture": seconds}
            print(size, name, {key: value for key, value in found[name].items() if key != "energy_mj"}, flush=True)
        result[size] = found
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(render(result, args.sizes))


def one_picture() -> RayBatch:
    """Return the rays of the first view of a shipped scene, with its source views."""
    scene = shipped_scenes("held_out")[0]
    sources = nearest_views(scene, scene.views[0].camera_to_world, SOURCES, exclude=[0])
    return RayBatch(*(tensor[None] for tensor in ray_batch(scene, scene.views[0], sources)))


def converted(size: str, recipe: str, batch: RayBatch) -> GNT:
    """Return a GNT of this size with random weights, its mixtures sending 40 % of the tokens to multiplication."""
    torch.manual_seed(0)
    model = create(size).eval()
    convert_(model, vitrify.recipes.get(str(HERE / recipe) if recipe.endswith(".yaml") else recipe))
    for mixture in (module for module in model.modules() if isinstance(module, Mixture)):
        mixture.router.register_forward_hook(_split)
    with torch.inference_mode():
        model(batch.select(slice(0, 256)))  # mixtures note their shares, which the graph is counted by
    return model


def _split(router: torch.nn.Module, inputs: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """Move the routers' thresholds to where 40 % of the tokens lie above."""
    gap = logits[..., 0] - logits[..., 1]
    shift = gap.flatten().kthvalue(max(1, round((1 - MULTIPLIED) * gap.numel()))).values
    return torch.stack([logits[..., 0] - shift, logits[..., 1]], -1)


def counts(model: GNT, batch: RayBatch) -> dict[str, Any]:
    """Return products by primitive and energy in mJ, as built (like for like) and with INT8 multiplication instead."""
    graph = vitrify.workload(model, example_inputs=(batch,))
    energy = vitrify.energy(graph)
    contenders = {
        name: (sum(row.pj[name] for row in energy.compare) + energy.vector_pj) * 1e-9 for name in energy.compare[0].pj
    }
    products = {primitive: int(graph.count(primitive)) for primitive in ("multiply", "shift", "add")}
    return {**products, "energy_mj": {"total": energy.total_pj * 1e-9, **contenders}}


def timed(models: dict[str, GNT], batch: RayBatch, chunk: int, seconds: float) -> dict[str, float]:
    """Return seconds per picture: the medians of encoding and of one chunk, the models taking turns."""
    ready = {name: copy.deepcopy(model) for name, model in models.items()}
    for model in ready.values():
        pack_(model)
    rays, chunks = batch.select(slice(0, chunk)), batch.origins.shape[1] / chunk
    encoding: dict[str, list[float]] = {name: [] for name in ready}
    tracing: dict[str, list[float]] = {name: [] for name in ready}
    until = time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < until or len(next(iter(tracing.values()))) < 5:
            for name, model in ready.items():
                started = time.perf_counter()
                features = model.encode(rays.images)
                encoded = time.perf_counter()
                model.trace(rays, features)
                encoding[name].append(encoded - started)
                tracing[name].append(time.perf_counter() - encoded)
    # The first turn warms up.
    return {
        name: statistics.median(encoding[name][1:]) + chunks * statistics.median(tracing[name][1:]) for name in ready
    }


def render(result: dict[str, Any], sizes: list[str]) -> str:
    """Return the table as Markdown."""
    head = "| row | G multiplications | G shifts | G additions | energy, mJ | with INT8 multiply, mJ | s per picture |"
    lines = []
    for size in sizes:
        lines += [f"\n{size}:\n", head, "|---|---|---|---|---|---|---|"]
        for name, found in result[size].items():
            products = (f"{found[kind] / 1e9:.2f}" for kind in ("multiply", "shift", "add"))
            energy = (f"{found['energy_mj'][kind]:.0f}" for kind in ("total", "INT8 multiply"))
            lines.append(
                f"| {ROWS[name]['what']} | {' | '.join([*products, *energy])} | {found['seconds_per_picture']:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
