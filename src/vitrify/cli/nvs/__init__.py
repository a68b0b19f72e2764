"""`vitrify nvs train | render | eval | demo`: novel view synthesis with GNT, a module each."""

from __future__ import annotations

import typer

from vitrify.cli.nvs import demo, render, train
from vitrify.cli.nvs import eval as eval_

app = typer.Typer(
    name="nvs",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Render new views of a scene from a few posed photographs with GNT, as it is or reparameterised.",
    epilog="[bold]A first session[/bold] (no network needed; scenes and models ship):\n\n"
    "vitrify nvs render gnt_small --scene still_life --output runs/fly\n\n"
    "vitrify nvs train gnt_small --recipe taylor --steps 500 --output runs/taylor\n\n"
    "vitrify nvs eval runs/taylor --output runs/taylor-views",
)
app.command("train", epilog=train.EPILOG)(train.train)
app.command("render", epilog=render.EPILOG)(render.render)
app.command("eval", epilog=eval_.EPILOG)(eval_.evaluate)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
