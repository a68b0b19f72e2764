"""`vitrify finetune`: recover what the conversion cost, from labels, from the original model, or from bare images."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vitrify.cli import options
from vitrify.cli.prepare import Preparation, check_alpha
from vitrify.errors import InputError

if TYPE_CHECKING:
    from torch import nn

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify finetune runs/linear --data fashion-mnist --epochs 3 --output runs/tuned\n\n"
    "vitrify finetune deit_tiny_patch16_224 --pretrained --recipe vitality --data ./imagenet --objective distill "
    "--amp bf16 --output runs/deit\n\n"
    "vitrify finetune hf:./dinov2-small --pretrained --data ./photos --objective features --output runs/dino   "
    "(needs no labels)\n\n"
    "vitrify finetune deit_tiny_patch16_224 --pretrained --plan shiftaddvit --data ./imagenet --output runs/shiftadd   "
    "(attention first, then the layers)\n\n"
    "accelerate launch -m vitrify finetune ...   (several GPUs)\n\n"
    "[bold]Interrupted?[/bold] The same command resumes from the last checkpoint and ends with the same weights."
)
_OPTIMISER, _REGULARISATION = "Optimiser", "Augmentation and regularisation"
_RUN = "The run"
_MIN_LR = 1e-6


def finetune(  # the command line's options; all but the model are given by name
    model: options.ModelArgument,
    data: options.DataOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; the result is its sub-folder model.")
    ],
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Convert by this recipe first. Default: an artefact stays as it is, another model gets vitality; "
            "softmax trains the unconverted model.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Convert and train in stages instead: shiftaddvit or vitrify (attention first, then the layers), or "
            "a YAML file with stages, each a recipe, epochs and lr.",
        ),
    ] = None,
    objective: Annotated[
        Literal["labels", "distill", "features"],
        typer.Option(help="Learn from labels; labels and the original model; or the original's features alone."),
    ] = "labels",
    teacher: Annotated[
        str, typer.Option(metavar="original|PATH", help="The model to learn from (distill, features).")
    ] = "original",
    alpha: Annotated[
        str,
        typer.Option(
            metavar="paper|measured|FILE",
            help="Latencies that mixtures balance their experts by: the paper's 6 : 4; measured here, and written to "
            "latencies.json in the run's folder; or such a file.",
        ),
    ] = "paper",
    threshold_schedule: Annotated[
        Literal["fixed", "rising"],
        typer.Option(
            help="The sparse part's threshold: the recipe's; or rising from 0 (softmax) until nothing is kept (Taylor)."
        ),
    ] = "fixed",
    epochs: Annotated[int, typer.Option(help="Passes over the images.", rich_help_panel=_OPTIMISER)] = 10,
    batch_size: Annotated[int, typer.Option(help="Images per step.", rich_help_panel=_OPTIMISER)] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate.", rich_help_panel=_OPTIMISER)] = 5e-4,
    min_lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate at the end.", show_default="1e-6, or --lr if lower", rich_help_panel=_OPTIMISER
        ),
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=_OPTIMISER)] = 0.05,
    warmup_epochs: Annotated[float, typer.Option(help="Then cosine.", rich_help_panel=_OPTIMISER)] = 0.5,
    clip_grad: Annotated[float, typer.Option(help="Largest gradient norm.", rich_help_panel=_OPTIMISER)] = 1.0,
    ema_decay: Annotated[
        float, typer.Option(help="Average the weights, e.g. 0.999; 0: do not.", rich_help_panel=_OPTIMISER)
    ] = 0.0,
    distill_alpha: Annotated[
        float, typer.Option(help="Share of the teacher's logits in the loss.", rich_help_panel=_OPTIMISER)
    ] = 0.5,
    distill_features_weight: Annotated[
        float, typer.Option(help="Weight of the per-block features in distill.", rich_help_panel=_OPTIMISER)
    ] = 0.0,
    augment: Annotated[
        Literal["none", "light", "rand"],
        typer.Option(help="Shift and flip; or RandAugment and erasing.", rich_help_panel=_REGULARISATION),
    ] = "light",
    mixup: Annotated[float, typer.Option(help="Alpha; 0: off.", rich_help_panel=_REGULARISATION)] = 0.0,
    cutmix: Annotated[float, typer.Option(help="Alpha; 0: off.", rich_help_panel=_REGULARISATION)] = 0.0,
    label_smoothing: Annotated[float, typer.Option(rich_help_panel=_REGULARISATION)] = 0.1,
    amp: Annotated[Literal["no", "bf16", "fp16"], typer.Option(help="Mixed precision.", rich_help_panel=_RUN)] = "no",
    grad_checkpointing: Annotated[
        bool, typer.Option("--grad-checkpointing", help="Recompute blocks, to save memory.", rich_help_panel=_RUN)
    ] = False,
    seed: Annotated[int, typer.Option(help="Every random draw follows from it.", rich_help_panel=_RUN)] = 0,
    limit_train: Annotated[int | None, typer.Option(help="Train on so many images only.", rich_help_panel=_RUN)] = None,
    max_steps: Annotated[int | None, typer.Option(help="End after so many steps.", rich_help_panel=_RUN)] = None,
    num_workers: Annotated[int, typer.Option(help="Processes that load images.", rich_help_panel=_RUN)] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between lines in metrics.jsonl.", rich_help_panel=_RUN)] = 20,
    checkpoint_every_s: Annotated[
        float, typer.Option(help="Seconds between checkpoints.", rich_help_panel=_RUN)
    ] = 60.0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with a run in --output.", rich_help_panel=_RUN)
    ] = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log there (extra).", rich_help_panel=_RUN)
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=_RUN)] = "auto",
    on_error: options.OnErrorOption = "raise",
    pretrained: options.PretrainedOption = False,
    checkpoint: options.CheckpointOption = None,
    img_size: options.ImgSizeOption = None,
    num_classes: options.NumClassesOption = None,
    in_chans: options.InChansOption = None,
) -> None:
    """Fine-tune a converted model, and write the result as an artefact.

    Each epoch is evaluated on the test (or val) images. Progress goes to the terminal and to OUTPUT/metrics.jsonl.
    """
    given = dict(locals())
    import torch

    from vitrify import recipes, train

    run = train.finetune  # first of all: without accelerate nothing else need be done
    if plan is not None and recipe is not None:
        raise InputError("give either --recipe or --plan, which has a recipe for each of its stages")
    stages = None if plan is None else train.get_plan(plan)
    chosen = None if recipe is None else recipes.get(recipe)
    given["min_lr"] = min(_MIN_LR, lr) if min_lr is None else min_lr
    fields = {field.name for field in dataclasses.fields(train.TrainConfig)}
    config = train.TrainConfig(**{name: value for name, value in given.items() if name in fields})
    use_device(device)
    # New heads are drawn when the model is built, and a resumed run must start from the same ones.
    torch.manual_seed(config.seed)
    weights = ("pretrained", "checkpoint", "img_size", "num_classes", "in_chans")
    student, guide = load_pair(
        model,
        teacher if objective != "labels" else None,
        {name: given[name] for name in weights},
        needs_head=objective == "distill",
    )
    if stages is None and chosen is None and not hasattr(student, "_vitrify"):
        chosen = recipes.vitality()
    asked = [] if chosen is None else [chosen]
    check_alpha(alpha, student, asked if stages is None else [stage.recipe for stage in stages.stages])
    task = train.make_task(
        config,
        options.open_data(data, "train", student, on_error=on_error, augment=augment),
        _open_evaluation(data, student, on_error, needs_labels=objective != "features"),
    )
    typer.echo(f"training on {getattr(task.train_dataset, 'source', data)}", err=True)
    go_on: Literal["auto", "never"] = "auto" if resume else "never"
    preparation = Preparation(task.train_dataset, alpha, config)
    try:
        if stages is not None:
            result = train.run_plan(
                student, stages, task, config, output, convert=preparation.convert, teacher=guide, resume=go_on
            )
        else:
            if chosen is None:
                preparation.fit(student, output)
            else:
                preparation.convert(student, chosen, output)
            result = run(student, task, config, output, teacher=guide, resume=go_on)
    except KeyboardInterrupt as interruption:
        typer.echo(f"\n{interruption or 'interrupted'}\nthe same command resumes from {output}", err=True)
        raise typer.Exit(130) from None
    for dataset in (task.train_dataset, task.eval_dataset):
        for path, reason in getattr(dataset, "skipped", ()):
            typer.echo(f"skipped {path}: {reason}", err=True)
    _print_result(output, result)


def _open_evaluation(data: str, student: nn.Module, on_error: str, *, needs_labels: bool) -> Any:
    """Return the test images; where they lack labels that are needed, the val images if these have some."""
    test = options.open_data(data, "test", student, on_error=on_error)
    if test.labelled or not needs_labels:
        return test
    val = options.open_data(data, "val", student, on_error=on_error)
    return val if val.labelled else test


def use_device(name: str) -> None:
    """Make Accelerate use the device: it takes the GPU where there is one, unless told otherwise by the environment."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda, not {name!r} (CUDA_VISIBLE_DEVICES picks among several)")
    if options.pick_device(name).type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"


def load_pair(
    spec: str, teacher: str | None, wanted: dict[str, Any], *, needs_head: bool = True
) -> tuple[nn.Module, nn.Module | None]:
    """Return the student, as it is before any conversion of this run, and its teacher (None if none is asked for)."""
    from vitrify.artefact import is_plain
    from vitrify.cli.eval import find_original

    student = options.load_model(spec, **wanted)
    guide: nn.Module | None = None
    if teacher == "original" and is_plain(student):
        guide = copy.deepcopy(student)
    elif teacher is not None:
        guide = find_original(student, teacher, needs_head=needs_head)
    return student, guide


def _print_result(run: Path, artefact: Path) -> None:
    from vitrify.train import read_metrics

    epochs = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "epoch"]
    if epochs:
        typer.echo("  ".join(f"{name} {value:.4f}" for name, value in epochs[-1]["eval"].items()))
    typer.echo(f"written: {artefact}")
