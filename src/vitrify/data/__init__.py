"""Data sets and transforms: Fashion-MNIST, image folders, and augmentation that does not depend on history.

>>> transform = build_transform((1, 28, 28), (0.286,), (0.353,), train=False)
>>> data = load_dataset("fashion-mnist", "test", transform=transform)
>>> image, label = data[0]  # (1, 28, 28) float32, int
"""

from vitrify.data.deterministic import DeterministicDataset
from vitrify.data.fashion import FashionMnist
from vitrify.data.folder import ImageFolder
from vitrify.data.load import load_dataset
from vitrify.data.transforms import build_transform

__all__ = ["DeterministicDataset", "FashionMnist", "ImageFolder", "build_transform", "load_dataset"]
