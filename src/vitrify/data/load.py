"""`load_dataset`: one name or path, one dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from vitrify.data.fashion import SOURCES, FashionMnist
from vitrify.data.folder import ImageFolder, OnError
from vitrify.errors import InputError, unknown

NAMES = ("fashion-mnist", *(f"fashion-mnist:{source}" for source in SOURCES))


def load_dataset(
    spec: str | Path, split: str, *, transform: Callable[[Any], Any] | None = None, on_error: OnError = "raise"
) -> FashionMnist | ImageFolder:
    """Open one split of a data set; an item is (PIL image, or what `transform` makes of it; label).

    A label is an int from 0 on, or -1 where there is none.

    Args:
        spec: "fashion-mnist" (the full set where Debian's or torchvision's is there, else the shipped subset),
            "fashion-mnist:shipped", "fashion-mnist:debian", "fashion-mnist:torchvision" (downloads to PyTorch's cache)
            or "fashion-mnist:torchvision=FOLDER"; or the path of an image folder, for whose layouts see `ImageFolder`.
            A folder that happens to be called fashion-mnist is reached as ./fashion-mnist.
        split: "train", "test" or "val" (for Fashion-MNIST, "val" is its test set).
        transform: applied to each PIL image.
        on_error: what an unreadable image does: "raise" an InputError with its path, or "skip" to the next readable
            one (for training; `ImageFolder.select` leaves such images out).

    Returns:
        A dataset with `classes`, `labelled`, `source` (which data this is, with counts) and `skipped`.

    Raises:
        InputError: unknown name, missing folder or split, no images, damaged files.
        VitrifyError: torchvision could not download.
    """
    if on_error not in get_args(OnError):
        raise unknown("on_error", on_error, get_args(OnError))
    name, _, origin = str(spec).partition(":")
    if name == "fashion-mnist":
        source, _, root = origin.partition("=")
        if source not in ("", *SOURCES) or (root and source != "torchvision"):
            raise unknown("data set", str(spec), NAMES)
        return FashionMnist(source or None, split, transform=transform, root=Path(root) if root else None)
    if not Path(spec).exists() and len(Path(spec).parts) == 1:
        raise InputError(f"{unknown('data set', str(spec), NAMES)}; and there is no folder of that name here")
    return ImageFolder(Path(spec), split, transform=transform, on_error=on_error)
