"""`vitrify nvs demo`: held-out views by the softmax model and by its reparameterised ones, beside the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrify.cli import options
from vitrify.cli.nvs import shared
from vitrify.errors import InputError, optional

EPILOG = (
    "[bold]Example[/bold]\n\nvitrify nvs demo --output demo-output-3d\n\n"
    "Writes report.html (opens offline), figures/*.png, results.json, and every picture in views/. Stopped, the same "
    "command goes on: pictures that are there are not rendered again.\n\n"
    "With models of your own: vitrify nvs demo --models runs/mine, a folder of artefacts, or of finished runs."
)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report; made if needed.")] = Path(
        "demo-output-3d"
    ),
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Show the artefacts or finished runs in this folder.", show_default="shipped"
        ),
    ] = None,
    views: Annotated[int, options.at_least(1, "Held-out views of each of the two scenes.")] = 1,
    sources: shared.SourcesOption = 8,
    chunk: shared.ChunkOption = 1024,
) -> None:
    """Render views of scenes that no model was trained on, and show what each model makes of them, and at what cost.

    On the CPU; needs no network and no GPU.
    """
    from rich.console import Console

    from vitrify.nvs.shipped import shipped_models

    with optional("matplotlib", "report", "the demo's report"):
        from vitrify.report import views as demonstration

    found = shipped_models() if models is None else shipped_models(models)
    if not found:
        where = "this installation" if models is None else f"the folder {models}"
        raise InputError(f"{where} holds no trained GNT: give --models a folder of artefacts or of finished runs")
    console = Console()
    loaded = {name: shared.load_gnt(str(path)) for name, path in found.items()}
    total = demonstration.picture_count(len(loaded), views)
    with shared.interruptible(output), shared.ray_bar(total) as advance:
        results = demonstration.run(
            output, loaded, views=views, sources=sources, chunk=chunk, progress=advance, say=console.print
        )
    console.print(demonstration.summary(results))
    console.print(f"open [bold]{output / 'report.html'}[/bold]")
