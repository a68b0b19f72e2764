"""The command line, `vitrify convert | finetune | eval | pack | export | bench | explain | ...`: a module each.

Commands import torch and timm inside their functions, so that `vitrify --help` answers at once. Exit codes: 0 done,
1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console

from vitrify import __version__
from vitrify.cli import (
    bench,
    convert,
    demo,
    explain,
    explore,
    export,
    finetune,
    nvs,
    pack,
    probe,
    profile,
    recipes,
    simulate,
)
from vitrify.cli import eval as eval_
from vitrify.errors import InputError, VitrifyError

app = typer.Typer(
    name="vitrify",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="[bold]A first session[/bold] (no network needed):\n\n"
    "vitrify convert vit_mini_patch2_28 --pretrained --output runs/linear\n\n"
    "vitrify finetune runs/linear --data fashion-mnist --epochs 1 --output runs/tuned\n\n"
    "vitrify eval runs/tuned --data fashion-mnist --against original\n\n"
    "Errors in full, with their traceback: VITRIFY_DEBUG=1 vitrify ...",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vitrify {__version__}")
        raise typer.Exit


@app.callback()
def _vitrify(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a pre-trained Vision Transformer into one that multiplies less, fine-tune it, and measure the gain."""


app.command("convert", epilog=convert.EPILOG)(convert.convert)
app.command("finetune", epilog=finetune.EPILOG)(finetune.finetune)
app.command("eval", epilog=eval_.EPILOG)(eval_.evaluate)
app.command("pack", epilog=pack.EPILOG)(pack.pack)
app.command("export", epilog=export.EPILOG)(export.export)
app.add_typer(bench.app)
app.add_typer(nvs.app)
app.command("explain", epilog=explain.EPILOG)(explain.explain)
app.command("probe", epilog=probe.EPILOG)(probe.probe)
app.command("profile", epilog=profile.EPILOG)(profile.profile)
app.command("simulate", epilog=simulate.EPILOG)(simulate.simulate)
app.command("explore", epilog=explore.EPILOG)(explore.explore)
app.command("demo", epilog=demo.EPILOG)(demo.demo)
app.command("recipes", epilog=recipes.EPILOG)(recipes.recipes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: this process's arguments) and return the exit code."""
    # Importing torch and timm makes a million objects that stay: looking for garbage among them costs a second.
    gc.set_threshold(100_000)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(args=None if arguments is None else list(arguments), prog_name="vitrify")
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except Exception as error:  # Whatever it is, the user gets one readable block and the right exit code.
            if os.environ.get("VITRIFY_DEBUG") == "1":
                traceback.print_exc()
            _report(error)
            return 2 if isinstance(error, InputError) else 1
    return 0


def _report(error: Exception) -> None:
    message = str(error) or type(error).__name__
    if not isinstance(error, VitrifyError):
        message = f"{type(error).__name__}: {message}\n(unexpected; VITRIFY_DEBUG=1 shows where)"
    Console(stderr=True, highlight=False, soft_wrap=True).print("[bold red]error:[/bold red]", end=" ")
    # Not as markup: messages hold lists in square brackets.
    print(message, file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
