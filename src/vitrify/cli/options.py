"""What several commands share: the options that name a model, a device and a data set, and what they mean."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn


def at_least(low: float, help: str) -> Any:
    """Return an option for numbers from `low` on. Typer's own `min` does not say which value it refuses."""

    def check(value: float | None) -> float | None:
        if value is not None and value < low:
            raise typer.BadParameter(f"must be at least {low:g}, not {value:g}")
        return value

    return typer.Option(callback=check, help=f"{help} At least {low:g}.")


# Where a fine-tuning run keeps its artefact: the folder of the run stands for it.
RUN_MODEL = "model"

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm name (deit_tiny_patch16_224), hf:FOLDER (a Hugging Face model), "
        "or the folder of an artefact or of a finished run.",
        show_default=False,
    ),
]
PretrainedOption = Annotated[bool, typer.Option("--pretrained", help="Load the published weights.")]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(help="Load weights from this .safetensors or .pth file (pickled code is never run).", metavar="FILE"),
]
ImgSizeOption = Annotated[int | None, at_least(1, "Image side, in pixels. Default: the model's own.")]
NumClassesOption = Annotated[int | None, at_least(0, "Width of the classifier; 0 for an encoder without one.")]
InChansOption = Annotated[int | None, at_least(1, "Image channels: 1 (grey) or 3.")]
RecipeOption = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="A recipe's name (`vitrify recipes` lists them) or a YAML file.")
]
DataOption = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help="fashion-mnist, from the first source that is there, or fashion-mnist:SOURCE: debian, torchvision, or "
        "shipped (the part that comes with vitrify). Or a folder: FOLDER/train/CLASS/ and FOLDER/val/CLASS/ with "
        "images, or images alone, without labels.",
        show_default=False,
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
OnErrorOption = Annotated[
    str, typer.Option("--on-error", metavar="raise|skip", help="An unreadable image: stop, or skip and count it.")
]


def artefact_at(path: str) -> Path | None:
    """Return the artefact folder that `path` means, itself or that of the finished run there; None if neither."""
    from vitrify.artefact import is_artefact

    return next((folder for folder in (Path(path) / RUN_MODEL, Path(path)) if is_artefact(folder)), None)


def load_model(spec: str, **wanted: Any) -> nn.Module:
    """Return the model that MODEL and the options beside it mean: an artefact folder, or `create_model`'s arguments."""
    from vitrify.artefact import create_model, load

    if (folder := artefact_at(spec)) is not None:
        if given := [f"--{name.replace('_', '-')}" for name, value in wanted.items() if value not in (None, False)]:
            raise InputError(f"{spec} is an artefact, which settles {', '.join(given)} itself: leave it out")
        return load(folder)
    if Path(spec).is_dir():
        raise InputError(f"the folder {spec} is not an artefact (a Hugging Face folder is given as hf:{spec})")
    if "/" in spec and ":" not in spec:
        raise InputError(f"there is no artefact at {spec}")
    model = create_model(spec, **wanted)
    if (img_size := wanted.get("img_size")) is not None:
        from vitrify.models.image_size import check_image_size

        check_image_size(model, img_size, "--img-size")
    return model


def check_writable(option: str, file: Path | None) -> None:
    """Raise InputError unless the file that `option` names can be written, before any work; its folder is made."""
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"{option} {file}: this is a folder; give a file")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise InputError(f"{option} {file}: cannot be written: {error.strerror or error}") from error


def pick_device(name: str) -> torch.device:
    """Return the device to use. InputError if it does not exist here."""
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if has_gpu else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, not {name!r}") from None
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s); use auto or cpu")
    return device


def open_data(
    spec: str, split: str, model: nn.Module, *, on_error: Any = "raise", augment: Any = None, limit: int | None = None
) -> Any:
    """Open a data set with the transform that `model` expects; `augment` makes it the training transform.

    Without `augment`, for evaluation, it holds `limit` images, evenly spread, less those that cannot be read.
    """
    from vitrify.artefact import input_config
    from vitrify.data import build_transform, load_dataset

    transform = build_transform(**input_config(model), train=augment is not None, augment=augment or "none")
    dataset = load_dataset(spec, split, transform=transform, on_error=on_error)
    total = len(dataset)
    if augment is None and (on_error == "skip" or (limit or total) < total):
        count = min(limit or total, total)
        indices = [i * total // count for i in range(count)]
        dataset.select(progress(indices, "checking images") if on_error == "skip" else indices)
    return dataset


def progress(steps: Any, what: str) -> Any:
    """Iterate over `steps` under a progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(steps, description=what, console=console, disable=not console.is_terminal, transient=True)
