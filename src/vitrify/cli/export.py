"""`vitrify export`: an artefact as an ONNX file, or as a library that TVM compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitrify.cli import options

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify export runs/tuned --output model.onnx\n\n"
    "vitrify export runs/tuned --output model.so   (for this CPU; with --target cuda for a GPU)\n\n"
    "vitrify export deit_tiny_patch16_224 --pretrained --output deit.onnx   (unconverted, to compare with)"
)


def export(
    model: options.ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .onnx file, or the .so library, to write.", show_default=False)
    ],
    target: Annotated[
        str | None,
        typer.Option(metavar="llvm|cuda", help="What a .so is compiled for: llvm, this CPU, is the default."),
    ] = None,
    batch: Annotated[int | None, options.at_least(1, "Images per call of a .so, 1 by default.")] = None,
    pretrained: options.PretrainedOption = False,
    checkpoint: options.CheckpointOption = None,
    img_size: options.ImgSizeOption = None,
) -> None:
    """Write a model as an ONNX file or as a compiled library, run and compared with PyTorch before it gets its name.

    .onnx: standard operators, any number of images, checked in ONNX Runtime; pip install 'vitrify[onnx]'.

    .so: compiled by TVM with ShiftAddViT's operators in it, for one number of images; pip install 'vitrify[tvm]'.
    For cuda the source of the kernels is written too, with the suffix .cu. In both, shift layers are packed.
    """
    from vitrify.errors import InputError

    if not output.parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist")
    if output.suffix not in (".onnx", ".so"):
        raise InputError(f"--output {output}: its name must end in .onnx, or in .so for a library compiled by TVM")
    if output.suffix == ".onnx" and (target is not None or batch is not None):
        raise InputError(f"--target and --batch are for libraries (.so): {output} takes any batch, on any device")
    built = options.load_model(model, pretrained=pretrained, checkpoint=checkpoint, img_size=img_size)
    if output.suffix == ".onnx":
        _onnx(built, output)
    else:
        _tvm(built, output, target or "llvm", batch or 1)
    typer.echo(f"written: {output} ({output.stat().st_size:,} bytes)")


def _onnx(model: Any, output: Path) -> None:
    from vitrify.artefact import export_onnx

    error = export_onnx(model, output)
    typer.echo(f"ONNX Runtime agrees with PyTorch: largest difference {error:.1e} of the largest output")


def _tvm(model: Any, output: Path, target: Any, batch: int) -> None:
    from vitrify.tvm import export_tvm

    error = export_tvm(model, output, target=target, batch=batch)
    if error is None:
        typer.echo("compiled, but not run: this machine has no CUDA device")
    else:
        typer.echo(f"TVM agrees with PyTorch: largest difference {error:.1e} of the largest output")
    if target == "cuda":
        typer.echo(f"written: {output.with_suffix('.cu')} (the source of its kernels)")
