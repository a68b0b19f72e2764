"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017; MIT licence): 28 x 28 grey photographs of clothes, ten classes.

Three sources: Debian's package `dataset-fashion-mnist`, torchvision's download, and a class-balanced subset that ships
with vitrify, so that examples and tests need neither a network nor root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.utils.data import Dataset

from vitrify.data.idx import read_idx
from vitrify.errors import InputError, VitrifyError, unknown

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
SHIPPED_ROOT = Path(__file__).parent / "fashion_mnist"
SPLITS = {"train": "train", "test": "test", "val": "test"}
SOURCES = ("shipped", "debian", "torchvision")
_PREFIX = {"train": "train", "test": "t10k"}

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]


class FashionMnist(Dataset[tuple[Any, int]]):
    """One split of Fashion-MNIST in memory; an item is (PIL image of mode L, or what `transform` makes of it; label 0
    to 9).

    Args:
        source: "shipped", "debian", "torchvision", or None for the first that is there in full: Debian's set, a
            download by torchvision in `torchvision_root()`, the shipped subset (5,000 training, 1,000 test images).
        split: "train", "test", or "val" for "test".
        transform: applied to the PIL image.
        root: where torchvision keeps (or puts) its download, `torchvision_root()` by default; only for
            `source="torchvision"`.

    Attributes:
        images: (N, 28, 28) uint8. labels: (N,) uint8. classes: the ten names. labelled: True. skipped: [] (nothing can
        be bad here). source: which data this is, with counts.

    Raises:
        InputError: unknown source or split; missing or damaged files (the message names the file).
        VitrifyError: torchvision could not download the files.
    """

    def __init__(
        self,
        source: str | None,
        split: str,
        *,
        transform: Callable[[Any], Any] | None = None,
        root: Path | None = None,
    ) -> None:
        if split not in SPLITS:
            raise unknown("split of Fashion-MNIST", split, SPLITS)
        split = SPLITS[split]
        if source is None:
            source = _default_source()
        if source == "debian":
            (self.images, self.labels), origin = _debian(split), "the full set, from Debian's dataset-fashion-mnist"
        elif source == "torchvision":
            (self.images, self.labels), origin = _torchvision(split, root), "the full set, from torchvision's download"
        elif source == "shipped":
            (self.images, self.labels), origin = _shipped(split), "the subset shipped with vitrify"
        else:
            raise unknown("source of Fashion-MNIST", source, SOURCES)
        _check(self.images, self.labels, origin)
        self.source = f"Fashion-MNIST {split}: {len(self.labels):,} images ({origin})"
        self.transform = transform
        self.classes = list(CLASSES)
        self.labelled = True
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return image if self.transform is None else self.transform(image), int(self.labels[index])

    def select(self, indices: Iterable[int]) -> None:
        """Keep only these items, in this order."""
        chosen = list(indices)
        self.images, self.labels = self.images[chosen], self.labels[chosen]


def torchvision_root() -> Path:
    """Return where vitrify looks for torchvision's download: ~/.cache/torch/hub/datasets, moved by $TORCH_HOME."""
    return Path(torch.hub.get_dir()) / "datasets"


def _default_source() -> str:
    files = [f"{prefix}-{kind}-ubyte" for prefix in _PREFIX.values() for kind in ("images-idx3", "labels-idx1")]
    if all((DEBIAN_ROOT / f"{name}.gz").is_file() for name in files):
        return "debian"
    downloaded = torchvision_root() / "FashionMNIST" / "raw"
    return "torchvision" if all((downloaded / name).is_file() for name in files) else "shipped"


def _debian(split: str) -> Arrays:
    if not DEBIAN_ROOT.is_dir():
        raise InputError(
            f"Debian's Fashion-MNIST is not in {DEBIAN_ROOT}: run `apt install dataset-fashion-mnist`, "
            "or use fashion-mnist:shipped or fashion-mnist:torchvision"
        )
    prefix = DEBIAN_ROOT / _PREFIX[split]
    return read_idx(Path(f"{prefix}-images-idx3-ubyte.gz"), 3), read_idx(Path(f"{prefix}-labels-idx1-ubyte.gz"), 1)


def _shipped(split: str) -> Arrays:
    with np.load(SHIPPED_ROOT / f"{split}.npz", allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


def _torchvision(split: str, root: Path | None) -> Arrays:
    from torchvision.datasets import FashionMNIST  # noqa: PLC0415  # the other sources do without it

    root = root or torchvision_root()
    try:
        data = FashionMNIST(root, train=split == "train", download=True)
    except (RuntimeError, OSError) as error:  # urllib's errors are OSErrors; torchvision adds RuntimeErrors
        reason = " ".join(str(error).split())  # torchvision's message runs over several lines
        raise VitrifyError(
            f"torchvision could not download Fashion-MNIST to {root}: {reason}. "
            "Without a network, use fashion-mnist:shipped or Debian's package dataset-fashion-mnist"
        ) from error
    return data.data.numpy(), data.targets.numpy().astype(np.uint8)


def _check(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], origin: str) -> None:
    if images.shape != (len(labels), 28, 28) or not len(labels) or labels.max() >= len(CLASSES):
        raise InputError(
            f"Fashion-MNIST ({origin}) is damaged: images {images.shape}, labels {labels.shape}, "
            f"expected (N, 28, 28) and N labels below {len(CLASSES)}"
        )
