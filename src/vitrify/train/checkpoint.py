"""Checkpoints that survive a kill: tensors in safetensors, the rest in JSON, one atomic rename; never pickle.

A checkpoint is a folder `step-00000123`. It is written under a temporary name, flushed to the disk and renamed, and
only then is the one before it removed: at any moment the highest `step-*` folder is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrify.artefact.checkpoints import mismatch
from vitrify.errors import InputError, VitrifyError
from vitrify.files import flush

FORMAT_VERSION = 1
_STATE = "state.json"
_STEP = "step-" + 8 * "[0-9]"


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run: named groups of tensors ("model", "optimizer", "ema") and JSON values."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `checkpoint` into `folder`, remove the earlier ones, and return its path.

    Raises VitrifyError if the disk is full or read-only: then the earlier checkpoint still stands.
    """
    target = folder / f"step-{checkpoint.step:08d}"
    if target.exists():
        return target
    temporary = folder / f".tmp-{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for group, tensors in checkpoint.tensors.items():
            # safetensors stores no strides and refuses shared memory.
            own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(own, temporary / f"{group}.safetensors")
        state = {"format_version": FORMAT_VERSION, "step": checkpoint.step, "groups": sorted(checkpoint.tensors)}
        (temporary / _STATE).write_text(json.dumps({**state, **checkpoint.state}, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        temporary.rename(target)
        flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise VitrifyError(f"could not write a checkpoint to {folder}: {error}. Earlier ones are intact") from error
    for other in found(folder):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)
    return target


def load_latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint in `folder`, or None; clears what an interrupted write left.

    Raises InputError if it is truncated, foreign, or of another version.
    """
    _remove_drafts(folder)
    checkpoints = found(folder)
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    try:
        state = json.loads((newest / _STATE).read_text())
        version = state["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(f"checkpoint {newest} has format version {version}, this is {FORMAT_VERSION}")
        tensors = {group: load_file(newest / f"{group}.safetensors") for group in state["groups"]}
        return Checkpoint(step=state["step"], tensors=tensors, state=state)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"checkpoint {newest} is truncated or not one of ours ({type(error).__name__}: {error}); "
            f"remove it, or start again with resume='never'"
        ) from error


def check_keys(kind: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise InputError unless `found` has exactly the keys and shapes of `expected`."""
    if problem := mismatch(expected, found):
        raise InputError(f"the checkpoint's {kind} does not fit this model: {problem}")


def found(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, the newest last."""
    return sorted(folder.glob(_STEP), key=lambda path: path.name)


def clear(folder: Path) -> None:
    """Remove the checkpoints in `folder`, and it if nothing else is there."""
    _remove_drafts(folder)
    for checkpoint in found(folder):
        shutil.rmtree(checkpoint, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _remove_drafts(folder: Path) -> None:
    for leftover in folder.glob(f".tmp-{_STEP}"):
        shutil.rmtree(leftover, ignore_errors=True)
