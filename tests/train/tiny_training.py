"""A model and data small enough to train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitrify import artefact
from vitrify.convert import AttentionSpec, Recipe, convert_
from vitrify.train import TrainConfig, finetune, make_task


class Blobs(Dataset[Any]):
    """Noisy 8 x 8 images whose class is their colour; the noise is drawn anew at each reading."""

    classes = ("a", "b", "c", "d")

    def __init__(self, count: int, *, labelled: bool = True) -> None:
        self.count, self.labelled = count, labelled

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.count:
            raise IndexError(index)
        image = 0.3 * torch.randn(3, 8, 8)
        image[0] += index % 2
        image[1] += index % 4 // 2
        return image, index % 4 if self.labelled else -1


def tiny_vit(recipe: Recipe | None = None, seed: int = 0, **changes: Any) -> nn.Module:
    """16 patches and a class token, two blocks with dropout and drop-path, so that randomness matters."""
    torch.manual_seed(seed)
    arguments = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    rates = {"proj_drop_rate": 0.1, "drop_path_rate": 0.1}
    model = artefact.create_model("vit_tiny_patch16_224", **{**arguments, **rates, **changes})
    if recipe is not None:
        convert_(model, recipe)
    return model


def sparse(threshold: float = 0.05, **changes: Any) -> Recipe:
    """Taylor with the sparse part, on few tokens too."""
    spec = AttentionSpec(core="taylor_sparse", threshold=threshold, **changes)
    return Recipe(attention=spec, keep_if_costlier=False)


def quick(**changes: Any) -> TrainConfig:
    """Two epochs of four steps."""
    return TrainConfig(**{"epochs": 2, "batch_size": 8, "lr": 1e-3, "log_every": 2, **changes})


def train(model: nn.Module, config: TrainConfig, folder: Path, **changes: Any) -> Path:
    """Train on 32 images, evaluate on 16."""
    return finetune(model, make_task(config, Blobs(32), Blobs(16)), config, folder, **changes)


def weights(artefact_folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an artefact."""
    return load_file(artefact_folder / "model.safetensors")


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Every tensor equal to the last bit, NaN not allowed."""
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
