"""`vitrify pack`: shift weights as packed codes, for deployment, and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrify.errors import InputError

EPILOG = "[bold]Example[/bold]\n\nvitrify pack runs/tuned --output runs/deployed"


def pack(
    artefact: Annotated[str, typer.Argument(metavar="ARTEFACT", help="An artefact folder, or a finished run's.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The artefact folder to write.", show_default=False)],
) -> None:
    """Replace the latent weights of shift layers by packed codes: the same results from a smaller file.

    Packed layers cannot be trained any more; keep the original artefact for that.
    """
    from vitrify.artefact import check_target, load, save
    from vitrify.cli.options import artefact_at
    from vitrify.convert import pack_
    from vitrify.nn import ShiftConv2d, ShiftLinear

    check_target(output)
    folder = artefact_at(artefact)
    if folder is None:
        raise InputError(f"there is no artefact at {artefact}: `vitrify convert` or `vitrify finetune` writes one")
    model = load(folder)
    shifting = any(isinstance(layer, (ShiftLinear, ShiftConv2d)) for layer in model.modules())
    count = pack_(model)
    if shifting and not count:
        raise InputError(f"{artefact} is packed already")
    if not count:
        raise InputError(
            f"{artefact} has no shift layer to pack: convert with a recipe that shifts, such as shiftaddvit"
        )
    save(model, output)
    before, after = ((path / "model.safetensors").stat().st_size for path in (folder, output))
    typer.echo(f"{count} shift layers packed: {before:,} -> {after:,} bytes ({before / after:.1f}x smaller)")
    typer.echo(f"written: {output}")
