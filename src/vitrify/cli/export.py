"""`vitrify export`: an artefact as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrify.cli import options

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify export runs/tuned --output model.onnx\n\n"
    "vitrify export deit_tiny_patch16_224 --pretrained --output deit.onnx   (unconverted, to compare with)"
)


def export(
    model: options.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.", show_default=False)],
    pretrained: options.PretrainedOption = False,
    checkpoint: options.CheckpointOption = None,
    img_size: options.ImgSizeOption = None,
) -> None:
    """Write a model as an ONNX file that takes any number of images, checked in ONNX Runtime.

    Shift layers are packed, and every op becomes standard ONNX operators. Needs the extra: pip install 'vitrify[onnx]'.
    """
    from vitrify.artefact import export_onnx
    from vitrify.errors import InputError

    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist")
    built = options.load_model(model, pretrained=pretrained, checkpoint=checkpoint, img_size=img_size)
    error = export_onnx(built, output)
    typer.echo(f"ONNX Runtime agrees with PyTorch: largest difference {error:.1e} of the largest output")
    typer.echo(f"written: {output} ({output.stat().st_size:,} bytes)")
