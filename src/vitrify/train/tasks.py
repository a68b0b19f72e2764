"""Tasks: what a batch means, what is minimised, what is measured. The trainer knows nothing else about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vitrify.data.deterministic import SizedDataset
from vitrify.errors import InputError
from vitrify.train.config import TrainConfig
from vitrify.train.features import BlockFeatures, converted_blocks, cosine, encode, feature_loss, logits_of

Logs = dict[str, Tensor]


class Task(ABC):
    """A data set, a loss and a measure. Subclass it to train something else.

    Attributes:
        train_dataset: items that the default collation can batch; `eval_dataset` likewise, or None.
        needs_teacher: the loss reads an unconverted model.
        partial: the loss leaves some parameters without gradient (a head that it never runs).
    """

    train_dataset: SizedDataset
    eval_dataset: SizedDataset | None
    needs_teacher = False
    partial = False

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> tuple[Tensor, Logs]:
        """Return the scalar to minimise, and detached scalars to log."""

    @abstractmethod
    def measure(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> Logs:
        """Return metrics of each sample of the batch, each of shape (batch,)."""

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        teacher: nn.Module | None = None,
        *,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> dict[str, float]:
        """Return the mean of each metric over the loader, in eval mode; `total` adds up over processes."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        sums: dict[str, Tensor] = {}
        count = 0
        for batch in loader:
            values = self.measure(model, to_device(batch, device), teacher)
            count += len(next(iter(values.values())))
            for name, value in values.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.float().sum()
        model.train(was_training)
        if not count:
            raise InputError("there is no image to evaluate on")
        totals = total(torch.stack([*sums.values(), torch.tensor(float(count), device=device)])).tolist()
        return {name: value / totals[-1] for name, value in zip(sums, totals[:-1], strict=True)}


def _is_labelled(dataset: SizedDataset | None) -> bool:
    return bool(getattr(dataset, "labelled", True))


class LabelsTask(Task):
    """Classification: cross-entropy with label smoothing, and with timm's mixup and cutmix if their alphas say so."""

    def __init__(
        self, config: TrainConfig, train_dataset: SizedDataset, eval_dataset: SizedDataset | None = None
    ) -> None:
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self._smoothing = config.label_smoothing
        self._classes = len(getattr(train_dataset, "classes", ()))
        self._mixup = None
        if config.mixup > 0 or config.cutmix > 0:
            if not self._classes:
                raise InputError("mixup and cutmix need a data set with `classes`")
            self._mixup = Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=self._classes,
            )
        self._require_labels(config, train_dataset, "train on")
        if eval_dataset is not None:
            self._require_labels(config, eval_dataset, "evaluate on")

    def _require_labels(self, config: TrainConfig, dataset: SizedDataset, purpose: str) -> None:
        if not _is_labelled(dataset):
            source = getattr(dataset, "source", type(dataset).__name__)
            raise InputError(
                f"objective {config.objective!r} needs labels, which the images to {purpose} lack ({source}): "
                f"use 'features', or 'distill' with distill_alpha=1"
            )

    def loss(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> tuple[Tensor, Logs]:
        """Return the cross-entropy."""
        images, targets = self._mixed(batch)
        loss = self._cross_entropy(logits_of(model, images), targets)
        return loss, {"loss": loss.detach()}

    def measure(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> Logs:
        """Return "top1" (0 or 1) and "loss" (cross-entropy, not smoothed)."""
        images, labels = batch
        logits = logits_of(model, images)
        self._check_width(logits)
        return {"top1": logits.argmax(1) == labels, "loss": F.cross_entropy(logits, labels, reduction="none")}

    def _mixed(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self._mixup is None:
            return images, labels
        # Mixup writes into the images, which the loader made for this step alone.
        images, targets = self._mixup(images, labels)
        return images, targets

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        self._check_width(logits)
        # Soft targets of mixup are smoothed already.
        return F.cross_entropy(logits, targets, label_smoothing=0.0 if targets.ndim == 2 else self._smoothing)

    def _check_width(self, logits: Tensor) -> None:
        if self._classes and logits.shape[1] != self._classes:
            raise InputError(
                f"the model has {logits.shape[1]} outputs and the data set {self._classes} classes: "
                f"create the model with num_classes={self._classes}"
            )


class DistillTask(LabelsTask):
    """Labels and the unconverted model: (1 - alpha) cross-entropy + alpha KL(teacher || student) + w block features."""

    needs_teacher = True

    def __init__(
        self, config: TrainConfig, train_dataset: SizedDataset, eval_dataset: SizedDataset | None = None
    ) -> None:
        super().__init__(config, train_dataset, eval_dataset)
        self._alpha = config.distill_alpha
        self._features_weight = config.distill_features_weight

    def _require_labels(self, config: TrainConfig, dataset: SizedDataset, purpose: str) -> None:
        if config.distill_alpha < 1:
            super()._require_labels(config, dataset, purpose)

    def measure(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> Logs:
        """Return what `LabelsTask` does; without labels, "agreement" (0 or 1) with the teacher's class and "kl"."""
        if _is_labelled(self.eval_dataset):
            return super().measure(model, batch, teacher)
        if teacher is None:
            raise InputError("without labels, logits are measured against the unconverted model: pass teacher=")
        logits, wanted = (logits_of(m, images_of(batch)) for m in (model, teacher))
        kl = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1)
        return {"agreement": logits.argmax(1) == wanted.argmax(1), "kl": kl}

    def loss(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> tuple[Tensor, Logs]:
        """Return the mixture; its parts are logged as "kl" and "blocks"."""
        assert teacher is not None
        images, targets = self._mixed(batch)
        names = block_names(model) if self._features_weight else []
        with torch.no_grad(), BlockFeatures(teacher, names) as wanted:
            teacher_logits = logits_of(teacher, images)
        with BlockFeatures(model, names) as got:
            logits = logits_of(model, images)
        kl = F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), log_target=True, reduction="batchmean")
        logs = {"kl": kl.detach()}
        loss = self._alpha * kl
        if self._alpha < 1:
            loss = loss + (1 - self._alpha) * self._cross_entropy(logits, targets)
        if names:
            blocks = block_loss(got, wanted)
            loss = loss + self._features_weight * blocks
            logs["blocks"] = blocks.detach()
        return loss, {"loss": loss.detach(), **logs}


class FeaturesTask(Task):
    """Recover an encoder without labels: every block's output and the output tokens follow the unconverted model's.

    loss = mean over blocks of the relative squared error + that of the output tokens + (1 - their mean cosine).
    """

    needs_teacher = True
    # The classifier, if there is one, takes no part.
    partial = True

    def __init__(
        self, config: TrainConfig, train_dataset: SizedDataset, eval_dataset: SizedDataset | None = None
    ) -> None:
        del config  # the same signature as every task; nothing in it bears on this one
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset

    def loss(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> tuple[Tensor, Logs]:
        """Return the sum; its parts are logged as "blocks", "output" and "token_cosine"."""
        assert teacher is not None
        images = images_of(batch)
        names = block_names(model)
        with torch.no_grad(), BlockFeatures(teacher, names) as wanted:
            teacher_tokens, _ = encode(teacher, images)
        with BlockFeatures(model, names) as got:
            tokens, _ = encode(model, images)
        blocks = block_loss(got, wanted)
        similarity = cosine(tokens, teacher_tokens).mean()
        output = feature_loss(tokens, teacher_tokens)
        loss = blocks + output + (1 - similarity)
        logs = {"loss": loss, "blocks": blocks, "output": output, "token_cosine": similarity}
        return loss, {name: value.detach() for name, value in logs.items()}

    def measure(self, model: nn.Module, batch: Any, teacher: nn.Module | None) -> Logs:
        """Return "token_cosine" (mean over tokens) and "pooled_cosine" to the teacher's features."""
        if teacher is None:
            raise InputError("features are measured against the unconverted model: pass teacher=")
        images = images_of(batch)
        (tokens, pooled), (teacher_tokens, teacher_pooled) = encode(model, images), encode(teacher, images)
        return {
            "token_cosine": cosine(tokens, teacher_tokens).mean(1),
            "pooled_cosine": cosine(pooled, teacher_pooled),
        }


_TASKS = {"labels": LabelsTask, "distill": DistillTask, "features": FeaturesTask}


def make_task(config: TrainConfig, train_dataset: SizedDataset, eval_dataset: SizedDataset | None = None) -> Task:
    """Return the task of `config.objective`. Items of the data sets are (image tensor (C, H, W), label)."""
    return _TASKS[config.objective](config, train_dataset, eval_dataset)


def block_names(model: nn.Module) -> list[str]:
    """Return the converted blocks, or raise InputError if there is none to match."""
    names = converted_blocks(model)
    if not names:
        raise InputError("no attention of this model is converted, so there is no block to match to the teacher's")
    return names


def block_loss(got: BlockFeatures, wanted: BlockFeatures) -> Tensor:
    """Return the mean over blocks of the relative squared error."""
    return torch.stack([feature_loss(got.outputs[name], wanted.outputs[name]) for name in got.outputs]).mean()


def images_of(batch: Any) -> Tensor:
    """Return the images of a batch that may carry labels."""
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    assert isinstance(images, Tensor)
    return images


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch: a tensor, or any nesting of tuples (named ones, too), lists and dicts of them."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)
