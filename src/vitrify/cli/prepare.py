"""What `vitrify finetune` does to a model before it trains: conversion, binary codes, and the experts' latencies."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vitrify.errors import InputError
from vitrify.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from vitrify.convert import Recipe
    from vitrify.train import TrainConfig

_CALIBRATION_IMAGES = 64


def check_alpha(alpha: str, model: nn.Module, recipes: Sequence[Recipe]) -> None:
    """Refuse latencies where neither the model nor the recipes have a mixture, rather than train without them."""
    from vitrify.nn import Mixture

    specs = [spec for r in recipes for spec in (r.projections, r.mlp, *r.modules.values())]
    mixes = any(getattr(spec, "primitive", None) == "mixture" for spec in specs)
    if alpha != "paper" and not mixes and not any(isinstance(module, Mixture) for module in model.modules()):
        raise InputError(f"--alpha {alpha}: there is no mixture to balance: leave it out, or use a recipe that mixes")


@dataclass(frozen=True)
class Preparation:
    """Prepares a model for the run of `config` on `train_dataset`; alpha: "paper", "measured" or a file."""

    train_dataset: Any
    alpha: str
    config: TrainConfig

    def convert(self, model: nn.Module, recipe: Recipe, folder: Path) -> None:
        """Convert the model, show how, and fit what is new; `folder`, the run's, keeps measured latencies."""
        from vitrify.artefact import input_config
        from vitrify.cli.show import print_conversion
        from vitrify.convert import convert_

        conversion = convert_(model, recipe, input_size=input_config(model)["input_size"])
        print_conversion(conversion, stderr=True)
        if not conversion.changed:
            raise InputError(f"recipe {recipe.name!r} changed nothing in {type(model).__name__}")
        self.fit(model, folder)

    def fit(self, model: nn.Module, folder: Path) -> None:
        """Calibrate codes that never were, on the first training images, and set alpha where there are mixtures."""
        from vitrify.nn import Hamming, Mixture, calibrate_codes_

        kinds = {kind for module in model.modules() for kind in (Hamming, Mixture) if isinstance(module, kind)}
        if Hamming in kinds:
            calibrate_codes_(model, self._images(_CALIBRATION_IMAGES), again=False)
        if self.alpha != "paper" and Mixture in kinds:
            self._set_latencies(model, folder)

    def _set_latencies(self, model: nn.Module, folder: Path) -> None:
        """Balance the mixtures by latencies from a file, or measured now and kept for when the run resumes.

        They are of the device, precision and batch of the run.
        """
        import torch
        from accelerate import PartialState

        from vitrify.nn import LatencyRecord, apply_latencies_, measure_latencies_

        measured = self.alpha == "measured"
        file = folder / "latencies.json" if measured else Path(self.alpha)
        processes = PartialState()
        images = self._images(max(1, self.config.batch_size // processes.num_processes)).to(processes.device)
        model.to(processes.device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.config.amp)
        autocast = nullcontext() if dtype is None else torch.autocast(processes.device.type, dtype)
        # The others read what the first process measured: one alpha for all.
        with processes.main_process_first(), autocast:
            if measured and not file.exists():
                typer.echo("measuring the experts' latencies", err=True)
                record = measure_latencies_(model, images)
                folder.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps(record.to_dict(), indent=1) + "\n")
            try:
                apply_latencies_(model, LatencyRecord.from_dict(json.loads(file.read_text())), images)
            except (OSError, ValueError) as error:
                if isinstance(error, InputError):
                    raise InputError(f"--alpha {file}: {error}") from error
                wanted = f"--alpha must be paper, measured or a latencies.json, not {self.alpha!r}"
                raise InputError(f"{wanted}: {error}") from error

    def _images(self, count: int) -> Tensor:
        import torch

        return torch.stack([self.train_dataset[i][0] for i in range(min(count, len(self.train_dataset)))])
