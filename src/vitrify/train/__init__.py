"""Fine-tuning: with labels, with a teacher, or from unlabelled images; resumable at any moment.

- `TrainConfig`, `make_task`, `finetune`: the three steps of a run.
- `Task`: subclass it to train something that is not here.
- `evaluate_against`: how close a converted encoder is to the original.
"""

from __future__ import annotations

from vitrify.train.config import TrainConfig
from vitrify.train.features import converted_blocks, encode
from vitrify.train.fidelity import evaluate_against
from vitrify.train.loop import finetune
from vitrify.train.metrics import read_metrics
from vitrify.train.schedule import learning_rate, rising_threshold
from vitrify.train.tasks import DistillTask, FeaturesTask, LabelsTask, Task, make_task

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
