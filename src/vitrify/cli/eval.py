"""`vitrify eval`: accuracy where there are labels, agreement with the original where there is one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options
from vitrify.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn

    from vitrify.accelerator.quantise import Quantised

NEIGHBOURS = 10
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify eval runs/tuned --data fashion-mnist\n\n"
    "vitrify eval runs/tuned --data ./photos --against original --json result.json\n\n"
    "vitrify eval vit_mini_patch2_28 --pretrained --data fashion-mnist --limit 500\n\n"
    "vitrify eval runs/tuned --data fashion-mnist --hardware vitality\n\n"
    "[bold]Against[/bold] the original: cosine of output tokens and of pooled features (1 is equal), and kNN "
    "agreement, the share of an image's 10 nearest neighbours among these images that both encoders agree on.\n\n"
    "[bold]Hardware[/bold]: products of integers at its widths, with scales found on images of the training split (of "
    "the split itself where there is none); normalisation, GELU and softmax's exponents in float."
)
CALIBRATION_IMAGES = 64


def evaluate(
    model: options.ModelArgument,
    data: options.DataOption,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="original|PATH",
            help="Also compare with the unconverted model (its weights as they were before conversion), "
            "or with the artefact, finished run or checkpoint at PATH.",
        ),
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Also measure the model at the widths of this accelerator: a preset's name, or a YAML file.",
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="test, val or train.")] = "test",
    batch_size: Annotated[int, options.at_least(1, "Images per step.")] = 64,
    limit: Annotated[int | None, options.at_least(1, "Use so many images only, evenly spread.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here too.")] = None,
    pretrained: options.PretrainedOption = False,
    checkpoint: options.CheckpointOption = None,
    img_size: options.ImgSizeOption = None,
    num_classes: options.NumClassesOption = None,
    in_chans: options.InChansOption = None,
    device: options.DeviceOption = "auto",
    on_error: options.OnErrorOption = "raise",
) -> None:
    """Measure a model: accuracy where the images have labels; with --against, how far it agrees with the original."""
    target = options.pick_device(device)
    if hardware is not None:
        from vitrify.accelerator.hardware import load

        load(hardware)  # before any work
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise InputError(f"--json {json_file}: there is no folder {json_file.parent}")
    built = options.load_model(
        model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        img_size=img_size,
        num_classes=num_classes,
        in_chans=in_chans,
    )
    reference = None if against is None else find_original(built, against)
    dataset = options.open_data(data, split, built, on_error=on_error, limit=limit)
    built = built.to(target).eval()
    known = {"model": model, "against": against, "data": dataset.source, "split": split}
    rounded, done = None, None
    if hardware is not None:
        rounded, done = at_widths_of(hardware, built, _calibration(data, split, built, on_error))
    result = {**known, **measure(built, reference and reference.to(target), dataset, batch_size, rounded)}
    if done is not None:
        result["hardware"] = {"name": hardware, **asdict(done), "summary": str(done)}
    if json_file is not None:
        from vitrify.files import write_atomically

        write_atomically(json_file, json.dumps(result, indent=2) + "\n")
    _print(result)


def find_original(model: nn.Module, against: str, *, needs_head: bool = True) -> nn.Module:
    """Return the model to compare with: "original" is the unconverted one, with the weights it was created with.

    A path is an artefact, a finished run, or a checkpoint for the unconverted architecture of `model`. With
    `needs_head`, a checkpoint without a classifier for the model's classes is refused.
    """
    from vitrify.artefact import load, load_weights, read_checkpoint, rebuild_original
    from vitrify.artefact.builders import describe, rebuild

    if against != "original" and (folder := options.artefact_at(against)) is not None:
        return load(folder)
    record: dict[str, Any] = getattr(model, "_vitrify_builder", None) or {}
    if against == "original":
        return rebuild_original(record)
    if not Path(against).is_file():
        raise InputError(
            "the model to compare with must be 'original', the folder of an artefact or of a finished run, or a "
            f"checkpoint file, not {against!r}"
        )
    original = rebuild(record if "library" in record else describe(model, set()))
    if load_weights(original, read_checkpoint(against), against) and needs_head:
        raise InputError(f"{against} has no classifier of this model's classes, so its answers cannot be compared")
    return original.eval()


def at_widths_of(hardware: str, model: nn.Module, images: Any) -> tuple[nn.Module, Quantised]:
    """Return a copy of the model that computes at a hardware's widths, and what was done to it."""
    from vitrify.accelerator.quantise import form_of, quantise_, widths_of
    from vitrify.nn.copying import copy_without_hooks

    rounded = copy_without_hooks(model)
    device = next(model.parameters()).device
    return rounded, quantise_(rounded, widths_of(hardware), [images.to(device)], form_of(hardware))


def _calibration(data: str, split: str, model: nn.Module, on_error: str) -> Any:
    """Return a batch of images to find scales on: of the training split, or of `split` where there is none."""
    import torch

    try:
        images = options.open_data(data, "train", model, on_error=on_error, limit=CALIBRATION_IMAGES)
    except InputError:
        images = options.open_data(data, split, model, on_error=on_error, limit=CALIBRATION_IMAGES)
    return torch.stack([images[index][0] for index in range(len(images))])


def measure(
    model: nn.Module, original: nn.Module | None, dataset: Any, batch_size: int, rounded: nn.Module | None = None
) -> dict[str, Any]:
    """Return accuracy (if labelled, and the model classifies) and agreement (if there is an original).

    rounded: the model at a hardware's widths, whose agreement with the model is measured where it has no accuracy.
    """
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size)
    result: dict[str, Any] = {"images": len(dataset)}
    models = {"accuracy": model, "accuracy_hardware": rounded, "accuracy_original": original}
    for name, candidate in models.items():
        if candidate is not None and (accuracy := _accuracy(candidate, dataset, loader)) is not None:
            result[name] = accuracy
    if original is not None:
        result["agreement"] = _agreement(original, model, loader)
    if rounded is not None and "accuracy_hardware" not in result:
        result["agreement_hardware"] = _agreement(model, rounded, loader)
    if len(result) == 1:
        raise InputError("nothing to measure: without labels, or without a classifier, give --against original")
    result["skipped"] = [{"path": str(path), "reason": reason} for path, reason in dataset.skipped]
    return result


def _agreement(original: nn.Module, model: nn.Module, loader: Any) -> dict[str, Any]:
    from vitrify.train import evaluate_against

    images = len(loader.dataset)
    if images < 2:
        raise InputError("comparing neighbours takes at least 2 images")
    neighbours = min(NEIGHBOURS, images - 1)
    return {"k": neighbours, **evaluate_against(original, model, options.progress(loader, "comparing"), k=neighbours)}


def _accuracy(model: nn.Module, dataset: Any, loader: Any) -> float | None:
    """Return top-1 accuracy in percent; None where there are no labels or no classifier."""
    import torch

    from vitrify.train.features import logits_of

    if not dataset.labelled or getattr(model, "num_classes", 1) == 0:
        return None
    device = next(model.parameters()).device
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in options.progress(loader, "classifying"):
            try:
                logits = logits_of(model, images.to(device))
            except UnsupportedError:  # an encoder, such as Hugging Face's ViTModel
                return None
            if logits.shape[1] != len(dataset.classes):
                raise InputError(
                    f"the model has {logits.shape[1]} classes and the data {len(dataset.classes)}: they do not fit"
                )
            correct += int((logits.argmax(1).cpu() == labels).sum())
    return 100 * correct / len(loader.dataset)


def _print(result: dict[str, Any]) -> None:
    typer.echo(f"data      {result['data']} ({result['split']}, {result['images']:,} images used)")
    for name, label in (("accuracy", "accuracy"), ("accuracy_original", "original")):
        if name in result:
            typer.echo(f"{label:<9} {result[name]:.2f} %")
    if "agreement" in result:
        _print_agreement(result["agreement"])
    if hardware := result.get("hardware"):
        reached = f"{result['accuracy_hardware']:.2f} %" if "accuracy_hardware" in result else "compared with float"
        typer.echo(f"hardware  {reached}, at the widths of {hardware['name']}")
        if "agreement_hardware" in result:
            _print_agreement(result["agreement_hardware"])
        for line in hardware["summary"].splitlines():
            typer.echo(f"          {line}")
    for skipped in result["skipped"]:
        typer.echo(f"skipped   {skipped['path']}: {skipped['reason']}", err=True)


def _print_agreement(agreed: dict[str, Any]) -> None:
    for name in ("token", "pooled"):
        mean, lowest = agreed[f"{name}_cosine_mean"], agreed[f"{name}_cosine_min"]
        typer.echo(f"{name:<9} cosine {mean:.4f} (lowest {lowest:.4f})")
    typer.echo(f"kNN       {agreed['knn_overlap']:.4f} of the {agreed['k']} nearest neighbours are the same")
