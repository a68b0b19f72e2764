"""Image folders, with or without labels, in which a damaged file is never silent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from vitrify.data.image import read_image
from vitrify.errors import InputError, unknown

OnError = Literal["raise", "skip"]
# What people call their split folders, best match first; the wording of `split` decides between val and test.
SPLIT_FOLDERS = {
    "train": ("train",),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "val", "validation", "valid"),
}
_logger = logging.getLogger(__name__)


class ImageFolder(Dataset[tuple[Any, int]]):
    """Images in a folder, labelled or not; an item is (image, label), the label -1 where there is none.

    Images are PIL, of mode L or RGB, or what `transform` makes of them.

    The layout is found by looking, in this order:

    1. `root` has a folder train, val, validation, valid or test: the one for `split` is used ("val" and "test" stand in
       for each other where only one exists), read as 2 or 3. Classes are numbered as in train, so labels agree between
       splits.
    2. It has sub-folders, and no image lies beside them: one class per sub-folder, in alphabetical order, images at any
       depth.
    3. It has images and no sub-folders: unlabelled.

    A folder without splits gives all its images for every split, and `source` says so. Hidden files and folders are
    ignored.

    Args:
        on_error: an unreadable image raises an InputError with its path and the reason ("raise"), or is logged once,
            counted in `skipped` and replaced by the next readable one ("skip": the dataset's length and the other items
            stay put). A twin would falsify a measurement: to evaluate, `select` first, which leaves such images out.

    Attributes:
        samples: list of (path string, label). classes: class names, empty if unlabelled. labelled: bool. source: which
        data, with counts. skipped: list of (path, reason) met so far, in whichever worker process.

    Raises:
        InputError: no such folder or split; no images, an empty class, images beside class folders, other folders with
            images beside splits, a class that train lacks.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        transform: Callable[[Any], Any] | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if split not in SPLIT_FOLDERS:
            raise unknown("split", split, SPLIT_FOLDERS)
        if on_error not in get_args(OnError):
            raise unknown("on_error", on_error, get_args(OnError))
        folder, has_splits = _split_folder(root, split)
        self.classes = _classes(folder)
        train = root / "train"
        if has_splits and folder != train and train.is_dir() and self.classes:
            self.classes = _classes_of_train(folder, self.classes, train)
        self.labelled = bool(self.classes)
        self.samples = _samples(folder, self.classes)
        self.transform = transform
        self.on_error = on_error
        # Shared, so that this process sees which images a DataLoader's workers could not read.
        self._bad = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]
        self._left_out: list[tuple[str, str]] = []
        kind = f"{len(self.classes)} classes" if self.labelled else "unlabelled"
        note = "" if has_splits else "; not split: the same images whether for training or evaluation"
        self.source = f"{folder}: {len(self.samples):,} images, {kind}{note}"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self._read(range(len(self))[index])
        return image if self.transform is None else self.transform(image), label

    def select(self, indices: Iterable[int]) -> None:
        """Keep only these items, in this order. With on_error="skip" each image is decoded, and the bad are left out.

        They are counted in `skipped`. Raises InputError if no image is left.
        """
        chosen = []
        for index in indices:
            path, _ = self.samples[index]
            try:
                if self.on_error == "skip":
                    read_image(path)
            except InputError as error:
                self._left_out.append((path, str(error)))
            else:
                chosen.append(index)
        if not chosen:
            raise InputError(f"none of the {len(self._left_out):,} images chosen of {self.source} can be read")
        self.samples = [self.samples[index] for index in chosen]
        self._bad = self._bad[chosen].share_memory_()

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The (path, reason) of every image that was asked for and could not be read."""
        replaced = [path for (path, _), bad in zip(self.samples, self._bad.tolist(), strict=True) if bad]
        return [*self._left_out, *((path, _why_unreadable(path)) for path in replaced)]

    def _read(self, index: int) -> tuple[Any, int]:
        for candidate in (*range(index, len(self)), *range(index)):
            path, label = self.samples[candidate]
            if self._bad[candidate]:
                continue
            try:
                return read_image(path), label
            except InputError as error:
                if self.on_error == "raise":
                    raise
                self._bad[candidate] = True
                _logger.warning("skipped: %s", error)
        raise InputError(f"none of the {len(self):,} images of {self.source} can be read")


def _why_unreadable(path: str) -> str:
    try:
        read_image(path)
    except InputError as error:
        return str(error)
    return f"{path} could not be read before, but can be now"


def _visible(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot list the folder {folder}: {error}") from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMG_EXTENSIONS and path.is_file()


def _holds_images(folder: Path) -> bool:
    return any(_is_image(path) for path in folder.rglob("*"))


def _split_folder(root: Path, split: str) -> tuple[Path, bool]:
    """Return the folder of the split, and whether `root` is split at all."""
    if not root.exists():
        raise InputError(f"data folder {root} does not exist")
    if not root.is_dir():
        raise InputError(f"{root} is a file; the data must be a folder of images")
    names = {name for names in SPLIT_FOLDERS.values() for name in names}
    folders = [path for path in _visible(root) if path.is_dir()]
    present = [path.name for path in folders if path.name in names]
    if not present:
        return root, False
    # A class may be called "train": to take it for a split would lose all other classes without a word.
    if others := [f"{path.name}/" for path in folders if path.name not in names and _holds_images(path)]:
        raise InputError(
            f"{root} has {', '.join(f'{name}/' for name in present)}, which name splits, beside other folders with "
            f"images: {', '.join(others[:5])}{' and more' if len(others) > 5 else ''}. If these are all classes, put "
            f"them into {root / 'train'}; if not, move what is not a split elsewhere"
        )
    for name in SPLIT_FOLDERS[split]:
        if name in present:
            return root / name, True
    wanted = " or ".join(f"{name}/" for name in SPLIT_FOLDERS[split])
    raise InputError(f"{root} has no {wanted} for the split {split!r}; it has {', '.join(f'{n}/' for n in present)}")


def _classes(folder: Path) -> list[str]:
    """Return the names of the class folders, or [] where images lie in the folder itself."""
    entries = _visible(folder)
    classes = [path.name for path in entries if path.is_dir()]
    image = next((path for path in entries if _is_image(path)), None)
    if classes and image is not None:
        raise InputError(
            f"{folder} holds both images ({image.name}) and folders ({classes[0]}/): for labelled data every image "
            "belongs in a class folder; for unlabelled data all images lie in one folder"
        )
    return classes


def _classes_of_train(folder: Path, classes: list[str], train: Path) -> list[str]:
    known = _classes(train)
    foreign = [name for name in classes if name not in known]
    if foreign:
        raise InputError(f"{folder} has classes that {train} lacks: {', '.join(foreign[:5])}")
    return known


def _samples(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    looked_for = f"(looked for {', '.join(IMG_EXTENSIONS)})"
    if not classes:
        samples = [(str(path), -1) for path in _visible(folder) if _is_image(path)]
    else:
        numbers = {name: label for label, name in enumerate(classes)}
        found = make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True)
        samples = [(path, label) for path, label in found if not _hidden(Path(path).relative_to(folder))]
    if not samples:
        raise InputError(f"no images in {folder} {looked_for}")
    # A class that only train has is fine; a folder without images is more likely a mistake than a wish.
    used = {classes[label] for _, label in samples if classes}
    for name in classes:
        if name not in used and (folder / name).is_dir():
            raise InputError(f"the class folder {folder / name} holds no images {looked_for}")
    return samples


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
