"""`vitrify demo`: the whole of vitrify once, in about five minutes, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrify.cli import options
from vitrify.errors import optional

EPILOG = (
    "[bold]Example[/bold]\n\nvitrify demo --output demo-output\n\n"
    "Writes report.html (opens offline), figures/*.png, results.json and two artefacts: run/model, which "
    "`vitrify eval demo-output/run/model --data fashion-mnist:shipped --against original` reads, and "
    "run-vitrify/model, whose layers also shift and mix."
)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report; made if needed.")] = Path(
        "demo-output"
    ),
    seconds: Annotated[
        float, options.at_least(1, "How long to fine-tune; a second copy gets half of it again.")
    ] = 120.0,
    data: options.DataOption = "fashion-mnist:shipped",
    seed: Annotated[int, options.at_least(0, "Seed of the fine-tuning.")] = 0,
) -> None:
    """Convert a small pre-trained ViT to linear attention, fine-tune it, and show what it costs and gains.

    A second copy also shifts in its projections and mixes multiplying and shifting MLPs.

    A small demonstration on real images (Fashion-MNIST), on the CPU; it needs no network and no GPU.
    """
    from rich.console import Console

    from vitrify.cli.finetune import use_device

    with optional("matplotlib", "report", "the demo's report"):
        from vitrify.report import demo as demonstration

    use_device("cpu")
    console = Console()
    results = demonstration.run(output, seconds=seconds, data=data, seed=seed, say=console.print)
    console.print(demonstration.summary(results))
    console.print(f"open [bold]{output / 'report.html'}[/bold]")
