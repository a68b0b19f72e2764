"""`vitrify nvs train`: a GNT from scratch, or one that was reparameterised, on posed photographs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitrify.cli import options
from vitrify.cli.nvs import shared
from vitrify.errors import InputError

if TYPE_CHECKING:
    from vitrify.convert import Recipe
    from vitrify.nvs import GNT, RayDataset, Scene

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify nvs train gnt_small --scratch --output runs/gnt   (on the shipped scenes; hours on 2 cores)\n\n"
    "vitrify nvs train gnt_small --recipe taylor --steps 500 --output runs/taylor\n\n"
    "vitrify nvs train runs/gnt --recipe vitrify --objective distill --output runs/vitrify\n\n"
    "vitrify nvs train gnt_small --scene ./fern --shrink 8 --output runs/fern   (your photographs, LLFF or COLMAP)\n\n"
    "[bold]Recipes[/bold]: attention along rays takes any of them; the attention over views subtracts, so that its "
    "linear layers alone are converted, and the list printed first says so.\n\n"
    "[bold]Interrupted?[/bold] The same command resumes from the last checkpoint and ends with the same weights."
)
_CALIBRATION_VIEWS = 4
_EVAL_RAYS = 1024
_MIN_LR = 1e-6


def train(
    model: shared.ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; the result is its sub-folder model.")
    ],
    scene: Annotated[
        list[str] | None,
        typer.Option(help=f"Train on this scene; repeatable. {shared.SCENE_HELP} Default: the shipped ones."),
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="MODEL is a preset, gnt_small or gnt: start from random weights.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Convert by this recipe first (`vitrify recipes` lists them)."),
    ] = None,
    objective: Annotated[
        Literal["labels", "distill"],
        typer.Option(help="Learn from the photographs; or half from what the unconverted model renders."),
    ] = "labels",
    steps: Annotated[int, options.at_least(1, "Optimiser steps.")] = 2000,
    eval_every: Annotated[int, options.at_least(1, "Steps between measures on held-out views.")] = 500,
    batch_size: Annotated[int, options.at_least(1, "Views per step.")] = 4,
    rays: Annotated[int, options.at_least(1, "Rays of each view per step.")] = 128,
    sources: shared.SourcesOption = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate; after 5 % of the steps, then cosine.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    recolour: Annotated[
        bool, typer.Option("--recolour/--no-recolour", help="Show each view in random other colours, too.")
    ] = True,
    shrink: shared.ShrinkOption = 1,
    amp: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Mixed precision.")] = "no",
    seed: Annotated[int, options.at_least(0, "Every random draw follows from it.")] = 0,
    checkpoint_every_s: Annotated[float, options.at_least(0, "Seconds between checkpoints.")] = 60.0,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with a run in --output.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train a GNT to render views of scenes from their other views, and write the result as an artefact.

    Of every scene the held-out views (every eighth, or those called test/...) are neither targets nor sources. The PSNR
    is measured on those views, with the shipped scenes on those of the two that are not trained on. Progress goes to
    the terminal and to OUTPUT/metrics.jsonl.
    """
    import torch

    from vitrify import recipes
    from vitrify import train as training
    from vitrify.cli.finetune import use_device
    from vitrify.nvs import RayDataset, RenderTask

    run = training.finetune  # first of all: without accelerate nothing else need be done
    chosen = None if recipe is None else recipes.get(recipe)
    scenes = shared.load_scenes(scene, shrink, "train")
    measured = scenes if scene else shared.load_scenes(None, shrink, "held_out")
    sources = _fitting_sources([*scenes, *measured], sources)
    seen = [_without_held_out(each) for each in scenes]
    # An epoch is what lies between two measures.
    repeats = max(1, round(min(eval_every, steps) * batch_size / sum(len(each.views) for each in seen)))
    data = RayDataset(seen, rays, sources, repeats=repeats, recolour=recolour)
    per_epoch = max(1, len(data) // batch_size)
    epochs = -(-steps // per_epoch)
    config = training.TrainConfig(
        epochs=epochs,
        max_steps=steps,
        batch_size=batch_size,
        lr=lr,
        min_lr=min(_MIN_LR, lr),
        weight_decay=weight_decay,
        warmup_epochs=min(0.05 * steps / per_epoch, epochs),
        objective=objective,
        amp=amp,
        seed=seed,
        checkpoint_every_s=checkpoint_every_s,
    )
    use_device(device)
    torch.manual_seed(seed)
    student = _start(model, scratch)
    teacher = copy.deepcopy(student) if objective == "distill" else None
    task = RenderTask(config, data, _held_out(measured, sources))
    typer.echo(f"training on {data.source}", err=True)
    if chosen is not None:
        _convert(student, chosen, data)
    with shared.interruptible(output):
        result = run(student, task, config, output, teacher=teacher, resume="auto" if resume else "never")
    _print_result(output, result)


def _start(model: str, scratch: bool) -> GNT:
    """Return what the run begins from."""
    from vitrify.nvs import create

    return create(model) if scratch else shared.load_gnt(model)


def _fitting_sources(scenes: list[Scene], wanted: int) -> int:
    """Return how many source views every view has, at most `wanted`; scenes of several sizes are refused."""
    from vitrify.nvs.scenes_io import held_out_views

    sizes = {(view.width, view.height) for scene in scenes for view in scene.views}
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise InputError(f"scenes to train on together must have images of one size, not {listed}")
    scene, fewest = min(
        ((scene.name, len(scene.views) - len(held_out_views(scene)) - 1) for scene in scenes), key=lambda each: each[1]
    )
    if fewest < 1:
        raise InputError(f"scene {scene!r} has too few views to train on: none is left beside a target")
    if fewest < wanted:
        typer.echo(f"{fewest} source views instead of {wanted}: scene {scene!r} has no more", err=True)
    return min(wanted, fewest)


def _without_held_out(scene: Scene) -> Scene:
    from vitrify.nvs.scenes_io import held_out_views

    hidden = set(held_out_views(scene))
    return scene.select([index for index in range(len(scene.views)) if index not in hidden])


def _held_out(scenes: list[Scene], sources: int) -> Any:
    """Return the held-out views of all scenes, on evenly spread rays."""
    from torch.utils.data import ConcatDataset

    from vitrify.nvs import RayDataset
    from vitrify.nvs.scenes_io import held_out_views

    return ConcatDataset(
        [RayDataset([each], _EVAL_RAYS, sources, targets=held_out_views(each), train=False) for each in scenes]
    )


def _convert(model: GNT, recipe: Recipe, data: RayDataset) -> None:
    """Convert the model, show how, and calibrate binary codes on a few training views."""
    from torch.utils.data import default_collate

    from vitrify.cli.show import print_conversion
    from vitrify.convert import convert_
    from vitrify.nn import Hamming, calibrate_codes_

    conversion = convert_(model, recipe)
    print_conversion(conversion, stderr=True)
    if not conversion.changed:
        raise InputError(f"recipe {recipe.name!r} changed nothing in this GNT")
    if any(isinstance(module, Hamming) for module in model.modules()):
        step = max(1, len(data) // _CALIBRATION_VIEWS)
        batch, _ = default_collate([data[index] for index in range(0, len(data), step)][:_CALIBRATION_VIEWS])
        calibrate_codes_(model, batch, again=False)


def _print_result(run: Path, artefact: Path) -> None:
    from vitrify.train import read_metrics

    epochs = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "epoch"]
    if epochs:
        typer.echo(f"PSNR on held-out views: {epochs[-1]['eval']['psnr']:.2f} dB")
    typer.echo(f"written: {artefact}")
