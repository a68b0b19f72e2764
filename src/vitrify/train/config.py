"""What a training run is: one frozen record, checked when it is made, stored beside what it produced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from vitrify.errors import InputError, unknown

Amp = Literal["no", "bf16", "fp16"]
ObjectiveName = Literal["labels", "distill", "features"]
ThresholdScheduleName = Literal["fixed", "rising"]

# A resumed run may change these: they move no weight.
FREE_ON_RESUME = frozenset({"num_workers", "checkpoint_every_s", "log_every", "tensorboard"})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run; a bad value raises InputError naming the field.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes together, so that one config means one training.
        lr: peak learning rate, reached after `warmup_epochs` (may be a fraction), then cosine down to `min_lr`.
        min_lr: where the cosine ends.
        weight_decay: AdamW's; biases, norms, position embeddings, tokens, thresholds and routers get none.
        label_smoothing: of the cross-entropy with labels.
        mixup, cutmix: the alphas of timm's Mixup; 0 switches each off.
        ema_decay: of the moving average of the weights; 0 means none. It warms up: 1 - (1 + step)^(-2/3) at most.
            With it, evaluation and the final artefact use the average.
        clip_grad: largest norm of the gradient; 0 means no clipping.
        seed: every random draw is a function of it, the epoch, the step and the process.
        num_workers: loader processes; 0 loads in the training process.
        amp: "no" (float32), "bf16", or "fp16" (with loss scaling; needs a GPU).
        grad_checkpointing: recompute the blocks in the backward pass, to save memory.
        objective: "labels"; "distill" (labels and teacher); "features" (teacher only: needs no label).
        distill_alpha: share of the teacher's term in the loss on the logits; the labels' term gets the rest.
        distill_features_weight: weight of the per-block feature loss added by "distill"; 0 leaves it out.
        threshold_schedule: of sparse cores: "fixed" (the recipe's T), or "rising" (see train.schedule).
        checkpoint_every_s: seconds between checkpoints; one is also written at the end of each epoch.
        log_every: optimiser steps between lines in metrics.jsonl.
        max_steps: end after so many steps even if epochs are left; the schedules end there too.
        limit_train: train on so many images only, drawn once from `seed`.
        tensorboard: also write the metrics for TensorBoard (extra `tensorboard`).
    """

    epochs: int = 10
    batch_size: int = 128
    lr: float = 5e-4
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    ema_decay: float = 0.0
    clip_grad: float = 1.0
    seed: int = 0
    num_workers: int = 0
    amp: Amp = "no"
    grad_checkpointing: bool = False
    objective: ObjectiveName = "labels"
    distill_alpha: float = 0.5
    distill_features_weight: float = 0.0
    threshold_schedule: ThresholdScheduleName = "fixed"
    checkpoint_every_s: float = 60.0
    log_every: int = 20
    max_steps: int | None = None
    limit_train: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "log_every", "max_steps", "limit_train"):
            self._require_int(name, 1)
        for name in ("seed", "num_workers"):
            self._require_int(name, 0)
        self._require_number("lr", 0.0, math.inf, open_low=True)
        for name in ("min_lr", "weight_decay", "warmup_epochs", "mixup", "cutmix", "clip_grad", "checkpoint_every_s"):
            self._require_number(name, 0.0, math.inf)
        self._require_number("distill_features_weight", 0.0, math.inf)
        self._require_number("distill_alpha", 0.0, 1.0)
        for name in ("label_smoothing", "ema_decay"):
            self._require_number(name, 0.0, 1.0, open_high=True)
        for name, valid in (("amp", Amp), ("objective", ObjectiveName), ("threshold_schedule", ThresholdScheduleName)):
            if getattr(self, name) not in get_args(valid):
                raise unknown(name, str(getattr(self, name)), get_args(valid))
        if self.min_lr > self.lr:
            raise InputError(f"min_lr must be at most lr ({self.lr:g}), not {self.min_lr:g}")
        if self.warmup_epochs > self.epochs:
            raise InputError(f"warmup_epochs must be at most epochs ({self.epochs}), not {self.warmup_epochs:g}")

    def _require_int(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is None and name in ("max_steps", "limit_train"):
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{name} must be a whole number of at least {low}, not {value!r}")

    def _require_number(
        self, name: str, low: float, high: float, *, open_low: bool = False, open_high: bool = False
    ) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and low <= value <= high and not (open_low and value == low) and not (open_high and value == high):
            return
        upper = "" if high == math.inf else f" and {'below' if open_high else 'at most'} {high:g}"
        raise InputError(f"{name} must be {'above' if open_low else 'at least'} {low:g}{upper}, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build from plain values; an unknown key raises InputError with the nearest known ones."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("training setting", key, known)
        return cls(**values)

    def check_resumes(self, stored: Mapping[str, Any], where: str) -> None:
        """Raise InputError naming each field in which `stored`, the config of the run at `where`, differs."""
        mine = self.to_dict()
        changed = [name for name in mine if name not in FREE_ON_RESUME and mine[name] != stored.get(name)]
        if changed:
            listed = "; ".join(f"{name} was {stored.get(name)!r}, is now {mine[name]!r}" for name in changed)
            raise InputError(
                f"{where} holds a run with other settings: {listed}. Choose another folder, or resume='never'"
            )
