"""`vitrify nvs eval`: PSNR and SSIM on held-out views, beside two trivial renderers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options
from vitrify.cli.nvs import shared

if TYPE_CHECKING:
    from vitrify.nvs.evaluate import Record

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify nvs eval gnt_small --output runs/views   (the two shipped scenes that are not trained on)\n\n"
    "vitrify nvs eval runs/taylor --scene market --scene ./fern --output runs/taylor-views\n\n"
    "[bold]Beside[/bold] the model: the nearest source view as it is, and the mean of the source views projected onto "
    "the plane on which they agree best. LPIPS is measured where its weights are on this machine; nothing is "
    "downloaded.\n\n"
    "[bold]Writes[/bold] SCENE/VIEW/ with truth.png, and for each renderer its picture, the error map (white: off by "
    "0.25 or more) and the numbers; the model's depth; and results.json. The same command goes on after a stop."
)


def evaluate(
    model: shared.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures and numbers.")],
    scene: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Measure on this scene; repeatable. {shared.SCENE_HELP} Default: the shipped held-out ones."
        ),
    ] = None,
    limit: Annotated[
        int | None, options.at_least(1, "Measure so many held-out views of each scene only, the first.")
    ] = None,
    sources: shared.SourcesOption = 8,
    shrink: shared.ShrinkOption = 1,
    chunk: shared.ChunkOption = 1024,
    device: options.DeviceOption = "auto",
) -> None:
    """Render the held-out views of scenes (every eighth, or those called test/...) and compare them with the truth."""
    from vitrify.bench.machine import describe
    from vitrify.files import write_atomically
    from vitrify.nvs import evaluate as evaluation
    from vitrify.nvs import metrics
    from vitrify.nvs.scenes_io import held_out_views
    from vitrify.train.run_folder import fingerprint

    target = options.pick_device(device)
    metrics.check_ssim()
    gnt = shared.load_gnt(model)
    scenes = shared.load_scenes(scene, shrink, "held_out")
    settings = {"weights": fingerprint(gnt), "sources": sources, "shrink": shrink}
    evaluation.claim(output, {"command": "nvs eval", **settings})
    gnt = gnt.to(target)
    if reason := metrics.why_no_lpips():
        typer.echo(f"without LPIPS: {reason}", err=True)
    records: list[Record] = []
    for each in scenes:
        if (most := len(each.views) - len(held_out_views(each))) < sources:
            typer.echo(f"{most} source views instead of {sources}: scene {each.name!r} has no more", err=True)
    views = {each.name: held_out_views(each)[:limit] for each in scenes}
    total = sum(map(len, views.values()))
    with shared.interruptible(output), shared.ray_bar(total) as advance:
        run = evaluation.renderer(gnt, chunk=chunk, progress=advance)
        for each in (each.in_memory() for each in scenes):
            for name, renderer in {**evaluation.BASELINES, "model": run}.items():
                records += evaluation.evaluate(name, renderer, each, output, sources=sources, views=views[each.name])
    result = {
        "model": model,
        **settings,
        "machine": str(describe()),
        "summary": evaluation.summary(records),
        "views": records,
    }
    write_atomically(output / "results.json", json.dumps(result, indent=1) + "\n")
    _print(records, evaluation.summary)
    typer.echo(f"pictures and numbers: {output}")


def _print(records: list[Record], summary: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_edge=False)
    keys = [key for key in ("psnr", "ssim", "lpips") if all(key in record for record in records)]
    titles = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
    for header in ("scene", "renderer", *(titles[key] for key in keys)):
        table.add_column(header, justify="left" if header in {"scene", "renderer"} else "right")
    names = list(dict.fromkeys(record["scene"] for record in records))
    for scene in [*names, "mean of scenes"] if len(names) > 1 else names:
        chosen = [record for record in records if scene in (record["scene"], "mean of scenes")]
        for renderer, means in summary(chosen).items():
            shown = (f"{means[key]:.2f}" if key == "psnr" else f"{means[key]:.3f}" for key in keys)
            table.add_row(scene, renderer, *shown)
    console = Console()
    console.width = max(console.width, 80)
    console.print(table)
