"""`vitrify convert`: replace attention by a recipe, show what changed, and write the artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrify.cli import options
from vitrify.errors import InputError

EPILOG = (
    "[bold]Recipes[/bold]: vitality (the paper's: Taylor attention, with a sparse part while training), taylor, "
    "sparse, softmax (changes nothing); or a YAML file. `vitrify recipes` explains them.\n\n"
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
    pretrained: options.PretrainedOption = False,
    checkpoint: options.CheckpointOption = None,
    img_size: options.ImgSizeOption = None,
    num_classes: options.NumClassesOption = None,
    in_chans: options.InChansOption = None,
) -> None:
    """Convert a model's attention by a recipe and write it as an artefact (a folder).

    Prints every module that was changed, kept, or refused and why. The weights are the given ones: accuracy drops until
    `vitrify finetune` has made up for it.
    """
    from vitrify import recipes
    from vitrify.artefact import check_target, input_config, save
    from vitrify.cli.show import print_conversion
    from vitrify.convert import convert_

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
    save(built, output)
    typer.echo(f"\nwritten: {output}")
    if not (pretrained or checkpoint or Path(model).is_dir()):
        typer.echo("note: the weights are random; --pretrained or --checkpoint loads trained ones", err=True)
