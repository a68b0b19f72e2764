"""Render held-out views by several GNTs and the trivial renderers, count what they cost, and have a page made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from vitrify.artefact import is_plain
from vitrify.bench.machine import describe
from vitrify.cost.energy import energy
from vitrify.cost.workload import workload
from vitrify.files import write_atomically
from vitrify.nn import Mixture
from vitrify.nvs import GNT, RayBatch, Scene, nearest_views
from vitrify.nvs.evaluate import BASELINES, claim, evaluate, renderer
from vitrify.nvs.evaluate import summary as means
from vitrify.nvs.metrics import check_ssim
from vitrify.nvs.render import Progress
from vitrify.nvs.routing import routing_maps
from vitrify.nvs.scenes_io import held_out_views, shipped_scenes
from vitrify.nvs.task import ray_batch
from vitrify.report.views import page
from vitrify.report.views.results import Cost, Results
from vitrify.train.run_folder import fingerprint

_SCENES = 2


def picture_count(models: int, views: int) -> int:
    """Return how many pictures `run` renders with models: a progress bar's total, but for the routing maps."""
    return models * views * _SCENES


def run(
    output: Path,
    models: Mapping[str, GNT],
    *,
    views: int,
    sources: int,
    chunk: int,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Results:
    """Render the first `views` held-out views of the two held-out scenes, and write the report into `output`.

    Errors as `nvs.evaluate.claim` and `evaluate`; InputError without scikit-image.
    """
    check_ssim()
    folder = output / "views"
    claim(folder, {"weights": {name: fingerprint(model) for name, model in models.items()}, "sources": sources})
    scenes = [scene.in_memory() for scene in shipped_scenes("held_out")]
    records = []
    for scene in scenes:
        targets = held_out_views(scene)[:views]
        for name, renderer_ in {**BASELINES, **_renderers(models, chunk, progress)}.items():
            say(f"{scene.name}: {name}")
            records += evaluate(name, renderer_, scene, folder, sources=sources, views=targets)
    first, target = scenes[0], scenes[0].views[held_out_views(scenes[0])[0]]
    chosen = nearest_views(first, target.camera_to_world, sources, exclude=held_out_views(first))
    mixed = {name: model for name, model in models.items() if any(isinstance(m, Mixture) for m in model.modules())}
    results = Results(
        records=records,
        pictures=folder,
        recipes={name: _recipe(model) for name, model in models.items()},
        costs={name: cost(model, first, sources) for name, model in models.items()},
        routing={name: routing_maps(model, first, target, chosen, chunk=chunk) for name, model in mixed.items()},
        sources=sources,
        scenes=scenes,
        machine=describe(),
    )
    page.write(results, output)
    write_atomically(output / "results.json", json.dumps(results.numbers(), indent=1) + "\n")
    return results


def cost(model: GNT, scene: Scene, sources: int) -> Cost:
    """Count what one picture of the scene's size costs, from so many source views of that size."""
    rays = ray_batch(scene, scene.views[0], [index % len(scene.views) for index in range(1, sources + 1)])
    graph = workload(model, example_inputs=(RayBatch(*(tensor[None] for tensor in rays)),))
    return Cost(
        multiply=int(graph.count("multiply")),
        shift=int(graph.count("shift")),
        add=int(graph.count("add")),
        energy_mj=energy(graph).total_pj * 1e-9,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
    )


def summary(results: Results) -> Table:
    """Return the results as a table for the terminal."""
    table = Table(show_edge=False)
    for header in ("renderer", "PSNR, dB", "SSIM", "G multiplications", "G shifts", "G additions"):
        table.add_column(header, justify="left" if header == "renderer" else "right")
    for name, found in means(results.records).items():
        spent = results.costs.get(name)
        counts = ("-",) * 3 if spent is None else (f"{n / 1e9:.1f}" for n in (spent.multiply, spent.shift, spent.add))
        table.add_row(name, f"{found['psnr']:.2f}", f"{found['ssim']:.3f}", *counts)
    return table


def _renderers(models: Mapping[str, GNT], chunk: int, progress: Progress | None) -> dict[str, Any]:
    return {name: renderer(model, chunk=chunk, progress=progress) for name, model in models.items()}


def _recipe(model: GNT) -> str:
    conversion = getattr(model, "_vitrify", None)
    return "none" if conversion is None or is_plain(model) else conversion.recipe.name
