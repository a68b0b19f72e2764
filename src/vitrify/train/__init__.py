"""Fine-tuning: with labels, with a teacher, or from unlabelled images; resumable at any moment.

- `TrainConfig`, `make_task`, `finetune`: the three steps of a run.
- `get_plan`, `run_plan`: a conversion in stages, each with its own fine-tuning.
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
    from vitrify.train.plan import Plan, get_plan, run_plan

__all__ = [
    "DistillTask",
    "FeaturesTask",
    "LabelsTask",
    "Plan",
    "Task",
    "TrainConfig",
    "converted_blocks",
    "encode",
    "evaluate_against",
    "finetune",
    "get_plan",
    "learning_rate",
    "make_task",
    "read_metrics",
    "rising_threshold",
    "run_plan",
]


def __getattr__(name: str) -> Any:
    # Measuring needs no accelerate, which is an extra: only training does.
    if name not in ("Plan", "finetune", "get_plan", "run_plan"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with optional("accelerate", "train", "fine-tuning"):
        from vitrify.train import plan  # noqa: PLC0415
    return getattr(plan, name)
