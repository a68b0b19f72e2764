"""`vitrify convert`: replace primitives by a recipe, show what changed, and write the artefact."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrify.cli import options
from vitrify.errors import InputError

if TYPE_CHECKING:
    from torch import nn

_IMAGES = 64

EPILOG = (
    "[bold]Recipes[/bold]: vitality (Taylor attention, with a sparse part while training), shiftaddvit (attention that "
    "adds, layers that shift, mixtures), vitrify (both papers), taylor, sparse, softmax (changes nothing); or a YAML "
    "file. `vitrify recipes` explains them.\n\n"
    "[bold]Examples[/bold]\n\n"
    "vitrify convert deit_tiny_patch16_224 --pretrained --output runs/deit\n\n"
    "vitrify convert deit_tiny_patch16_224 --checkpoint deit.pth --img-size 384 --output runs/deit384\n\n"
    "vitrify convert hf:./dinov2-small --pretrained --recipe my.yaml --output runs/dino\n\n"
    "Next: vitrify finetune runs/deit --data FOLDER --output runs/tuned"
)


def convert(
    model: options.ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artefact folder to write.", show_default=False)],
    recipe: options.RecipeOption = "vitality",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Fit binary codes, and round shift weights by their output error, on 64 training images of this data "
            "set (see finetune --data).",
        ),
    ] = None,
    pretrained: options.PretrainedOption = False,
    checkpoint: options.CheckpointOption = None,
    img_size: options.ImgSizeOption = None,
    num_classes: options.NumClassesOption = None,
    in_chans: options.InChansOption = None,
) -> None:
    """Convert a model by a recipe and write it as an artefact (a folder).

    Prints every module that was changed, kept, or refused and why. The weights are the given ones: accuracy drops until
    `vitrify finetune` has made up for it.
    """
    from vitrify import recipes
    from vitrify.artefact import check_target, input_config, save
    from vitrify.cli.show import print_conversion
    from vitrify.convert import convert_
    from vitrify.nn import Hamming

    check_target(output)
    chosen = recipes.get(recipe)
    built = options.load_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=img_size,
        num_classes=num_classes,
        in_chans=in_chans,
    )
    conversion = convert_(built, chosen, input_size=input_config(built)["input_size"])
    print_conversion(conversion)
    if not conversion.changed:
        raise InputError(f"recipe {chosen.name!r} changed nothing in {model}: nothing was written")
    if calibrate is not None:
        _calibrate(built, calibrate)
    elif any(isinstance(module, Hamming) and module.needs_calibration() for module in built.modules()):
        typer.echo("note: the codes are not fitted; --calibrate does that now, or else finetune will", err=True)
    save(built, output)
    typer.echo(f"\nwritten: {output}")
    if not (pretrained or checkpoint or Path(model).is_dir()):
        typer.echo("note: the weights are random; --pretrained or --checkpoint loads trained ones", err=True)


def _calibrate(model: nn.Module, data: str) -> None:
    """Fit what conversion left open, first the codes, since the shift layers after them see their results."""
    import torch

    from vitrify.nn import Hamming, ShiftLinear, calibrate_codes_, calibrate_shift_

    dataset = options.open_data(data, "train", model, limit=_IMAGES)
    images = torch.stack([image for image, _ in dataset])
    kinds = {type(module) for module in model.modules()}
    if not kinds & {Hamming, ShiftLinear}:
        raise InputError("--calibrate: this recipe makes no binary codes and no shift layers, so nothing can be fitted")
    if Hamming in kinds:
        fits = calibrate_codes_(model, images)
        typer.echo(f"codes explain {statistics.mean(fits.values()):.0%} of the logits (mean of {len(fits)} modules)")
    if ShiftLinear in kinds:
        errors = calibrate_shift_(model, torch.split(images, 16))
        before, after = (statistics.mean(column) for column in zip(*errors.values(), strict=True))
        typer.echo(f"output error of {len(errors)} shift layers: {before:.1%} -> {after:.1%} (means)")
