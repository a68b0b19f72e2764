"""Fine-tuning: with labels, with a teacher, or from unlabelled images; resumable at any moment.

- `TrainConfig`, `make_task`, `finetune`: the three steps of a run.
- `Task`: subclass it to train something that is not here.
- `evaluate_against`: how close a converted encoder is to the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitrify.errors import optional
from vitrify.train.config import TrainConfig
from vitrify.train.features import converted_blocks, encode
from vitrify.train.fidelity import evaluate_against
from vitrify.train.metrics import read_metrics
from vitrify.train.schedule import learning_rate, rising_threshold
from vitrify.train.tasks import DistillTask, FeaturesTask, LabelsTask, Task, make_task

if TYPE_CHECKING:
    from vitrify.train.loop import finetune

__all__ = [
    "DistillTask",
    "FeaturesTask",
    "LabelsTask",
    "Task",
    "TrainConfig",
    "converted_blocks",
    "encode",
    "evaluate_against",
    "finetune",
    "learning_rate",
    "make_task",
    "read_metrics",
    "rising_threshold",
]


def __getattr__(name: str) -> Any:
    # Measuring needs no accelerate, which is an extra: only training does.
    if name != "finetune":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with optional("accelerate", "train", "fine-tuning"):
        from vitrify.train.loop import finetune  # noqa: PLC0415
    return finetune
