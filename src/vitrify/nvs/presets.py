"""GNTs by name: the published architecture, and one that two CPU cores can train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from vitrify.artefact.compare import differences
from vitrify.errors import InputError, unknown
from vitrify.nvs.model import GNT, Architecture

PRESETS: dict[str, dict[str, Any]] = {
    # The cross-scene model of the released code (configs/gnt_full). It was trained with dropout 0.1.
    "gnt": {
        "width": 64,
        "depth": 8,
        "num_heads": 4,
        "squeeze": 8,
        "points": 64,
        "fine_points": 0,
        "fine_net": False,
        "frequencies": 10,
        "features": 32,
        "channels": (64, 128, 256),
        "blocks": (3, 4, 6),
        "strides": (2, 2),
        "dropout": 0.0,
    },
    "gnt_small": {
        "width": 32,
        "depth": 4,
        "num_heads": 4,
        "squeeze": 16,
        "points": 32,
        "fine_points": 0,
        "fine_net": False,
        "frequencies": 6,
        "features": 16,
        "channels": (16, 32, 48),
        "blocks": (1, 1, 1),
        "strides": (2, 1),
        "dropout": 0.0,
    },
}


def create(name: str, **changes: Any) -> GNT:
    """Build a preset with fresh weights, on the CPU; `changes` replace fields of its `Architecture`.

    Raises InputError for an unknown name or field, and for numbers that make no sense.

    >>> create("gnt", fine_points=64).architecture.depth
    8
    """
    if name not in PRESETS:
        raise unknown("GNT", name, PRESETS)
    known = [field.name for field in fields(Architecture)]
    for key in changes:
        if key not in known:
            raise unknown("field of a GNT", key, known)
    return GNT(Architecture(**{**PRESETS[name], **changes}))


def describe(model: nn.Module, converted: set[str]) -> dict[str, Any]:
    """Return the record from which `rebuild` builds this GNT; what artefacts keep.

    Raises InputError where the model is more than its architecture says, outside of the `converted` modules.
    """
    if type(model) is not GNT:
        raise InputError(f"{type(model).__name__} is not a whole GNT")
    with torch.device("meta"):
        reference = GNT(model.architecture)
    if problem := next(differences(model, reference, converted), None):
        raise InputError(f"building a GNT of this architecture gives another model: {problem}")
    return {**(getattr(model, "_vitrify_builder", None) or {}), "arguments": asdict(model.architecture)}


def rebuild(record: Mapping[str, Any]) -> GNT:
    """Build the unconverted GNT of a record, with fresh weights. Raises InputError for a record that is none."""
    try:
        return GNT(Architecture(**record["arguments"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"the artefact's record of its GNT is damaged: {error}") from error
