"""The folder of one run: which run it holds, whether it can be resumed, whether it is complete.

config.json      the settings, the recipe, the number of training images
metrics.jsonl    one line per log interval and per epoch
checkpoint/      the newest checkpoint
model/           the artefact, once the run is complete
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vitrify import artefact
from vitrify.errors import InputError
from vitrify.files import write_atomically
from vitrify.train.config import TrainConfig

Resume = Literal["auto", "never"]


class RunFolder:
    """Paths and state of an output folder; making one checks nothing and writes nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoint"
        self.model = self.path / "model"

    @property
    def is_complete(self) -> bool:
        """Whether the final artefact is there (it is written in one rename)."""
        return artefact.is_artefact(self.model)

    def prepare(self, config: TrainConfig, identity: dict[str, Any], resume: Resume) -> None:
        """Make the folder ready: checked against the run it holds, or cleared with resume="never".

        Raises InputError if it holds another run, naming what differs, or cannot be written.
        """
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
            shutil.rmtree(self.checkpoints, ignore_errors=True)
        artefact.check_target(self.model)
        if self.is_complete or any(self.checkpoints.glob("step-*")):
            self._check_same_run(config, identity)
        write_atomically(self.config, json.dumps({"config": config.to_dict(), **identity}, indent=1) + "\n")

    def _check_same_run(self, config: TrainConfig, identity: dict[str, Any]) -> None:
        try:
            stored = json.loads(self.config.read_text())
            stored_config = dict(stored["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.config} is missing or damaged ({error}): resume='never' starts again") from error
        config.check_resumes(stored_config, str(self.path))
        for name, value in identity.items():
            if stored.get(name) != value:
                raise InputError(
                    f"{self.path} holds a run with another {name}: {stored.get(name)!r}, now {value!r}. "
                    f"Choose another folder, or resume='never'"
                )


def identity_of(model: nn.Module, num_images: int) -> dict[str, Any]:
    """Return what, besides the config, makes a run this run, as JSON values."""
    conversion = getattr(model, "_vitrify", None)
    recipe = conversion.recipe.to_dict() if conversion is not None else None
    return {"model": type(model).__name__, "recipe": json.loads(json.dumps(recipe)), "train_images": num_images}
