"""The recipes that have a name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vitrify.convert.recipe import Recipe
from vitrify.convert.specs import AttentionSpec, LinearSpec
from vitrify.errors import InputError, unknown


def vitality() -> Recipe:
    """ViTALiTy's: low-rank Taylor attention, plus the sparse part while training.

    Threshold 0.5 is recalled, not checked, as the paper's; the released code has 0.002. docs/papers.md 3.
    """
    return Recipe("vitality", AttentionSpec("taylor_sparse", threshold=0.5, bits=4))


def shiftaddvit() -> Recipe:
    """ShiftAddViT's: attention on binary codes, which only adds; shifting projections; MLPs as a mixture of both.

    PVT's spatial reduction goes, and attention over 49 tokens (its last stage) stays softmax, as the authors have it.
    Shift weights have 5 bits, DeepShift's default. docs/papers.md 5 to 9.
    """
    return Recipe(
        "shiftaddvit",
        AttentionSpec("hamming", value_conv=3, reduction="remove", bias="drop"),
        projections=LinearSpec("shift", bits=5),
        mlp=LinearSpec("mixture", bits=5),
        min_tokens=64,
    )


def vitrify() -> Recipe:
    """Both papers at once: Taylor attention with a convolution, shifting projections, and MLPs as a mixture.

    docs/papers.md 2, 4, 7, 8, 9.
    """
    return Recipe(
        "vitrify",
        AttentionSpec("taylor", value_conv=3, reduction="remove"),
        projections=LinearSpec("shift", bits=5),
        mlp=LinearSpec("mixture", bits=5),
    )


def taylor() -> Recipe:
    """Taylor attention alone, in training too."""
    return Recipe("taylor", AttentionSpec("taylor"))


def sparse() -> Recipe:
    """Softmax over the entries that a 4-bit predictor keeps, in training and inference (Sanger): the baseline."""
    return Recipe("sparse", AttentionSpec("sparse"))


def softmax() -> Recipe:
    """The identity: every attention computes what it did, bit for bit, through a core that can be observed."""
    return Recipe("softmax", AttentionSpec("softmax"))


_RECIPES: dict[str, Callable[[], Recipe]] = {
    r.__name__: r for r in (shiftaddvit, softmax, sparse, taylor, vitality, vitrify)
}


def names() -> list[str]:
    """Return the names `get` knows."""
    return sorted(_RECIPES)


def get(name_or_path: str | Path) -> Recipe:
    """Return the recipe of that name, or the one in that YAML or JSON file.

    >>> get("vitality").attention.core
    'taylor_sparse'
    """
    text = str(name_or_path)
    if text in _RECIPES:
        return _RECIPES[text]()
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        return Recipe.from_yaml(path)
    if "/" in text:
        raise InputError(f"recipe file {text!r} does not exist")
    raise unknown("recipe", text, names())
