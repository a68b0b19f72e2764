"""Which rays and points use multiplication: where the trained mixtures of rows of rows.yaml send their tokens.

    python experiments/nvs/routing.py                    after run.py; writes routing.json beside it

On all held-out views of the two scenes that no model was trained on. A *ray* may look at detail or at a flat surface:
the quarter of a picture's pixels with the largest and the smallest gradient of the true picture. A *point* lies near or
far: the first and the last quarter of its ray. "unseen" are points in no source view.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from skimage.filters import sobel
from torch import Tensor

from vitrify import artefact
from vitrify.nvs import nearest_views
from vitrify.nvs.projection import sample
from vitrify.nvs.rays import RayBatch, spread
from vitrify.nvs.routing import routing_maps
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.scenes_io import held_out_views, shipped_scenes
from vitrify.nvs.task import ray_batch

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent.parent / "runs" / "nvs"
SOURCES: int = yaml.safe_load((HERE / "rows.yaml").read_text())["sources"]
QUARTER = 0.25
Kinds = dict[str, Tensor]


def main() -> None:
    """Measure the rows and write routing.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["vitrify", "shiftaddvit"], metavar="ROW")
    rows = parser.parse_args().rows
    result = {row: shares(row) for row in rows}
    (HERE / "routing.json").write_text(json.dumps(result, indent=1) + "\n")
    print(render(result))


def shares(row: str) -> dict[str, dict[str, float]]:
    """Return, by mixture, the mean over views of the share that multiplies: of all points, and of each kind."""
    model = artefact.load(RUNS / row / "model")
    found: dict[str, dict[str, list[float]]] = {}
    for scene in (each.in_memory() for each in shipped_scenes("held_out")):
        hidden = held_out_views(scene)
        for target in (scene.views[index] for index in hidden):
            sources = nearest_views(scene, target.camera_to_world, SOURCES, exclude=hidden)
            maps = routing_maps(model, scene, target, sources)
            for name, multiplies in maps.items():
                for kind, chosen in kinds(scene, target, sources, multiplies.shape[-1]).items():
                    values = found.setdefault(name, {}).setdefault(kind, [])
                    values += [multiplies[chosen].float().mean().item()] if chosen.any() else []
            print(row, scene.name, target.name, flush=True)
    return {
        name: {kind: statistics.mean(values) for kind, values in by_kind.items() if values}
        for name, by_kind in found.items()
    }


def kinds(scene: Scene, target: View, sources: list[int], points: int) -> Kinds:
    """Return masks (H, W, points): all points, those of two kinds of rays, of two kinds of places, and the unseen."""
    detail = torch.from_numpy(sobel(target.rgb().mean(0).numpy()))
    size = (*detail.shape, points)
    place = torch.arange(points).expand(size)
    batch = RayBatch(*(tensor[None] for tensor in ray_batch(scene, target, sources)))
    depths = spread(batch.bounds, batch.origins.shape[1], points, jitter=False)
    seen = sample(batch, batch.images, depths).valid.any(-1).reshape(size)
    return {
        "all": torch.ones(size, dtype=torch.bool),
        "rays at detail": (detail >= detail.quantile(1 - QUARTER))[..., None].expand(size),
        "flat rays": (detail <= detail.quantile(QUARTER))[..., None].expand(size),
        "near": place < points * QUARTER,
        "far": place >= points * (1 - QUARTER),
        "unseen": ~seen,
    }


def render(result: dict[str, Any]) -> str:
    """Return a table for each row as Markdown, in percent."""
    lines = []
    for row, by_mixture in result.items():
        columns = list(dict.fromkeys(kind for shares in by_mixture.values() for kind in shares))
        lines += [f"\n{row}, share that multiplies, %:\n", f"| mixture | {' | '.join(columns)} |"]
        lines.append("|---|" + "---|" * len(columns))
        for name, found in by_mixture.items():
            cells = (f"{100 * found[kind]:.0f}" if kind in found else "-" for kind in columns)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
