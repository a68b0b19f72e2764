"""`vitrify eval`: accuracy where there are labels, agreement with the original where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options
from vitrify.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from torch import nn

NEIGHBOURS = 10
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify eval runs/tuned --data fashion-mnist\n\n"
    "vitrify eval runs/tuned --data ./photos --against original --json result.json\n\n"
    "vitrify eval vit_mini_patch2_28 --pretrained --data fashion-mnist --limit 500\n\n"
    "[bold]Against[/bold] the original: cosine of output tokens and of pooled features (1 is equal), and kNN "
    "agreement, the share of an image's 10 nearest neighbours among these images that both encoders agree on."
)


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
    result = measure(built.to(target), reference and reference.to(target), dataset, batch_size)
    result = {"model": model, "against": against, "data": dataset.source, "split": split, **result}
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


def measure(model: nn.Module, original: nn.Module | None, dataset: Any, batch_size: int) -> dict[str, Any]:
    """Return accuracy (if labelled, and the model classifies) and agreement (if there is an original)."""
    from torch.utils.data import DataLoader

    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size)
    result: dict[str, Any] = {"images": len(dataset)}
    models = {"accuracy": model} | ({"accuracy_original": original} if original is not None else {})
    for name, candidate in models.items():
        if (accuracy := _accuracy(candidate, dataset, loader)) is not None:
            result[name] = accuracy
    if original is not None:
        from vitrify.train import evaluate_against

        if len(dataset) < 2:
            raise InputError("comparing neighbours takes at least 2 images")
        neighbours = min(NEIGHBOURS, len(dataset) - 1)
        compared = evaluate_against(original, model, options.progress(loader, "comparing"), k=neighbours)
        result["agreement"] = {"k": neighbours, **compared}
    if len(result) == 1:
        raise InputError("nothing to measure: without labels, or without a classifier, give --against original")
    result["skipped"] = [{"path": str(path), "reason": reason} for path, reason in dataset.skipped]
    return result


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
    if agreed := result.get("agreement"):
        for name in ("token", "pooled"):
            mean, lowest = agreed[f"{name}_cosine_mean"], agreed[f"{name}_cosine_min"]
            typer.echo(f"{name:<9} cosine {mean:.4f} (lowest {lowest:.4f})")
        typer.echo(f"kNN       {agreed['knn_overlap']:.4f} of the {agreed['k']} nearest neighbours are the same")
    for skipped in result["skipped"]:
        typer.echo(f"skipped   {skipped['path']}: {skipped['reason']}", err=True)
