"""The folder of one run: which run it holds, whether it can be resumed, whether it is complete.

Nothing in it is overwritten or removed unless its config.json says that it is the folder of a run.

config.json      the settings, and what else makes the run: model, recipe, data, the weights it started from
metrics.jsonl    one line per log interval and per epoch
checkpoint/      the newest checkpoint
model/           the artefact, once the run is complete
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitrify import artefact
from vitrify.errors import InputError
from vitrify.files import write_atomically
from vitrify.train import checkpoint as checkpoints
from vitrify.train.config import TrainConfig

FORMAT = "vitrify-run"
Resume = Literal["auto", "never"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RunFolder:
    """Paths and state of an output folder; making one checks nothing and writes nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoint"
        self.metrics = self.path / "metrics.jsonl"
        self.model = self.path / "model"

    @property
    def is_complete(self) -> bool:
        """Whether the final artefact is there (it is written in one rename)."""
        return artefact.is_artefact(self.model)

    def prepare(self, config: TrainConfig, identity: dict[str, Any], resume: Resume) -> None:
        """Make the folder ready: checked against the run it holds, or that run cleared with resume="never".

        Raises InputError if it holds another run, naming what differs, or anything that is not a run's and would be
        overwritten, or if it cannot be written. Then nothing is changed.
        """
        artefact.check_target(self.model)
        is_run = self._check_ours()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(f"cannot write to the output folder {self.path}: {error}") from error
        if resume == "never":
            # The artefact first: what is left of a cleared run must not look complete.
            if self.is_complete:
                shutil.rmtree(self.model)
            checkpoints.clear(self.checkpoints)
        elif is_run and (self.is_complete or checkpoints.found(self.checkpoints)):
            self._check_same_run(config, identity)
        content = {"format": FORMAT, "config": config.to_dict(), **identity}
        write_atomically(self.config, json.dumps(content, indent=1) + "\n")

    def _check_ours(self) -> bool:
        """Return whether this is the folder of a run; InputError if it is not, but has what a run would overwrite."""
        if artefact.is_artefact(self.path):
            raise InputError(f"{self.path} is an artefact: give a new folder, in which the run will write its model/")
        if self.config.exists():
            try:
                stored = json.loads(self.config.read_text())
            except (OSError, ValueError):
                stored = None
            if isinstance(stored, dict) and stored.get("format") == FORMAT:
                return True
        names = (self.config, self.metrics, self.model, *checkpoints.found(self.checkpoints))
        if taken := [str(path.relative_to(self.path)) for path in names if path.is_file() or _has_entries(path)]:
            raise InputError(
                f"{self.path} holds {taken[0]}, but is not the folder of a run (no config.json with format "
                f"{FORMAT!r}): choose another folder"
            )
        return False

    def _check_same_run(self, config: TrainConfig, identity: dict[str, Any]) -> None:
        stored = json.loads(self.config.read_text())
        config.check_resumes(stored["config"], str(self.path))
        for name, value in identity.items():
            if stored.get(name) != value:
                raise InputError(
                    f"{self.path} holds a run with another {name.replace('_', ' ')}: {stored.get(name)!r}, now "
                    f"{value!r}. Choose another folder, or resume='never'"
                )


def identity_of(model: nn.Module, teacher: nn.Module | None, data: Any, num_images: int) -> dict[str, Any]:
    """Return what, besides the config, makes a run this run, as JSON values; `model` is not trained yet.

    `data` is the training data set: its `source`, where it has one, says which images these are.
    """
    conversion = getattr(model, "_vitrify", None)
    recipe = conversion.recipe.to_dict() if conversion is not None else None
    return {
        "model": f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters",
        "recipe": json.loads(json.dumps(recipe)),
        "data": getattr(data, "source", None),
        "train_images": num_images,
        "initial_weights": fingerprint(model),
        "teacher": None if teacher is None else fingerprint(teacher),
    }


def fingerprint(model: nn.Module) -> str:
    """Return 16 hexadecimal digits that follow from the names, shapes and values of all parameters and buffers.

    Values are summed as the integers that their bits spell: exact, whatever the device or the number of threads, and
    cheap beside one training step. Weights that differ by chance alone never agree.
    """
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            real = torch.view_as_real(value) if value.is_complex() else value
            total = real.contiguous().view(_INTEGERS[real.element_size()]).sum(dtype=torch.int64)
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} {int(total)}\n".encode())
    return digest.hexdigest()[:16]


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
