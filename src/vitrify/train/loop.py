"""The training loop, on Hugging Face Accelerate: one process or many, any precision, resumable at any moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, Subset

from vitrify import artefact
from vitrify.convert.adapters.base import Adapter
from vitrify.data import DeterministicDataset
from vitrify.data.deterministic import SizedDataset
from vitrify.errors import InputError
from vitrify.nn.cores import TaylorSparse
from vitrify.train import checkpoint as checkpoints
from vitrify.train.checkpoint import Checkpoint
from vitrify.train.config import TrainConfig
from vitrify.train.determinism import EpochBatches, permutation, seed_step
from vitrify.train.features import check_teacher
from vitrify.train.interrupt import Interruption
from vitrify.train.objective import Objective, checkpointed_blocks, unfused_softmax
from vitrify.train.optimizer import build_optimizer, load_state_tensors, state_tensors
from vitrify.train.recorder import Recorder
from vitrify.train.run_folder import Resume, RunFolder, identity_of
from vitrify.train.schedule import RisingThreshold, learning_rate
from vitrify.train.tasks import Task, to_device


def finetune(
    model: nn.Module,
    task: Task,
    config: TrainConfig,
    output_dir: str | Path,
    *,
    teacher: nn.Module | None = None,
    resume: Resume = "auto",
) -> Path:
    """Train `model`, converted or not, on `task`, and return the path of the final artefact, `output_dir`/model.

    The model is trained in place and left in eval mode with the final weights (with `ema_decay`, the averaged ones).
    `teacher` is the unconverted model, moved to the same device and put in eval mode; it is never trained.

    A run in `output_dir` is resumed from its last checkpoint, and ends with the same weights as if it had never
    stopped (to the bit on a CPU with as many threads); a complete one is only loaded. resume="never" starts again.

    Raises InputError for settings that do not fit the data, model or the run in `output_dir`; VitrifyError if the loss
    is no longer finite or the disk is full; KeyboardInterrupt, after a checkpoint, on Ctrl-C or SIGTERM.
    """
    folder = RunFolder(output_dir)
    accelerator = _accelerator(config, task, model)
    if task.needs_teacher:
        if teacher is None:
            raise InputError(f"objective {config.objective!r} needs the unconverted model: pass teacher=")
        check_teacher(model, teacher)
    dataset = _limited(task.train_dataset, config)
    _check_batches(len(dataset), config, accelerator.num_processes)
    if accelerator.is_main_process:
        guide = teacher if task.needs_teacher else None
        folder.prepare(config, identity_of(model, guide, task.train_dataset, len(dataset)), resume)
    accelerator.wait_for_everyone()
    if folder.is_complete:
        artefact.load(folder.model, model)
        accelerator.print(f"{folder.path} holds this run, complete: nothing to train", file=sys.stderr)
        return folder.model
    Trainer(model, task, config, folder, teacher, accelerator, dataset).fit()
    return folder.model


class Trainer:
    """One run: `fit()` restores the last checkpoint, trains to the end, and writes the artefact."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        folder: RunFolder,
        teacher: nn.Module | None,
        accelerator: Accelerator,
        dataset: SizedDataset,
    ) -> None:
        self.accelerator, self.task, self.config, self.folder = accelerator, task, config, folder
        self.model = model.to(accelerator.device)
        self.teacher = None if teacher is None else teacher.to(accelerator.device).eval()
        self.data = DeterministicDataset(dataset, config.seed)
        self.steps_per_epoch = len(self.data) // config.batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.step = 0
        self.objective, self.optimizer = accelerator.prepare(
            Objective(self.model, task, self.teacher), build_optimizer(self.model, config.lr, config.weight_decay)
        )
        # After prepare, which gives every process the weights of the first.
        self.ema = ModelEmaV3(self.model, config.ema_decay, use_warmup=True) if config.ema_decay else None
        self.thresholds = RisingThreshold(self.model) if config.threshold_schedule == "rising" else None
        self.recorder = Recorder(
            config,
            accelerator,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            learning_rate=self._learning_rate,
            sparse_cores={name: m for name, m in self.model.named_modules() if isinstance(m, TaylorSparse)},
        )

    def fit(self) -> None:
        """Train from where the last checkpoint left off."""
        self._restore()
        self.saved_at = time.monotonic()
        on_cpu = self.accelerator.device.type == "cpu"
        with (
            self.recorder.start(self.folder.path, self.step),
            self.thresholds or nullcontext(),
            checkpointed_blocks(self.model, self.config.grad_checkpointing),
            unfused_softmax(self.model) if on_cpu else nullcontext(),
            Interruption() as self.interruption,
        ):
            while self.step < self.total_steps:
                self._train_epoch()
        self._finish()

    def _train_epoch(self) -> None:
        epoch, first_step = divmod(self.step, self.steps_per_epoch)
        self.objective.train()
        for batch in self._batches(epoch, first_step):
            self._train_step(batch)
            if self.step == self.total_steps:
                break
            if self.step % self.steps_per_epoch:
                self._maybe_checkpoint()
        self.recorder.write_epoch(
            self.step, self._evaluate(), skipped=len(getattr(self.task.train_dataset, "skipped", ()))
        )
        self._checkpoint()
        self._stop_if_interrupted()

    def _train_step(self, batch: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(self.step)
        if self.thresholds is not None:
            self.thresholds.progress = self.step / self.total_steps
        seed_step(self.config.seed, self.step, self.accelerator.process_index)
        loss, logs = self.objective(to_device(batch, self.accelerator.device))
        self.accelerator.backward(loss)
        if self.config.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        self.recorder.add(self.step, logs)

    def _batches(self, epoch: int, first_step: int) -> Iterator[Any]:
        self.data.set_epoch(epoch)
        batches = EpochBatches(
            len(self.data),
            self.config.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            first_step=first_step,
        )
        return iter(DataLoader(self.data, batch_sampler=batches, **self._loader_options()))

    def _evaluate(self) -> dict[str, float]:
        """Return the metrics over the evaluation set, with the averaged weights if there are any."""
        dataset: Any = self.task.eval_dataset
        if dataset is None:
            return {}
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        mine = Subset(dataset, range(rank, len(dataset), world_size))
        loader = DataLoader(mine, batch_size=self.config.batch_size, **self._loader_options())
        model = self.model if self.ema is None else self.ema.module
        with self.accelerator.autocast():
            return self.task.evaluate(model, loader, self.teacher, total=self.accelerator.reduce)

    def _loader_options(self) -> dict[str, Any]:
        return {"num_workers": self.config.num_workers, "pin_memory": self.accelerator.device.type == "cuda"}

    def _learning_rate(self, step: int) -> float:
        warmup = round(self.config.warmup_epochs * self.steps_per_epoch)
        return learning_rate(step, self.total_steps, warmup, self.config.lr, self.config.min_lr)

    def _maybe_checkpoint(self) -> None:
        # The clock and the signals of processes differ, so many agree now and then, and one alone at every step.
        if self.accelerator.num_processes > 1 and self.step % self.config.log_every:
            return
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_every_s
        if self._any_process(due or self.interruption.requested):
            self._checkpoint()
            self._stop_if_interrupted()

    def _stop_if_interrupted(self) -> None:
        if self._any_process(self.interruption.requested):
            raise KeyboardInterrupt(f"stopped at step {self.step}; the same call resumes from {self.folder.path}")

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device)) > 0)

    def _checkpoint(self) -> None:
        # First, for it notices a loss that is not finite: weights behind it are never written.
        self.recorder.flush(self.step)
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.model.state_dict(),
                "optimizer": state_tensors(self.optimizer.optimizer, self.model),
                **({"ema": self.ema.module.state_dict()} if self.ema is not None else {}),
            }
            scaler = self.accelerator.scaler
            state = {
                "recorder": self.recorder.state(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            }
            checkpoints.save(self.folder.checkpoints, Checkpoint(self.step, tensors, state))
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _restore(self) -> None:
        found = checkpoints.load_latest(self.folder.checkpoints)
        if found is None:
            return
        self.step = found.step
        for kind, module in (("model", self.model), ("ema", self.ema and self.ema.module)):
            if module is not None:
                checkpoints.check_keys(kind, module.state_dict(), found.tensors[kind])
                module.load_state_dict(found.tensors[kind])
        load_state_tensors(self.optimizer.optimizer, self.model, found.tensors["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.state["scaler"])
        self.recorder.restore(found.state["recorder"])
        self.accelerator.print(f"resuming at step {self.step} of {self.total_steps}", file=sys.stderr)

    def _finish(self) -> None:
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        self.model.eval()
        artefact.mark_trained(self.model)
        if self.accelerator.is_main_process:
            artefact.save(self.model, self.folder.model)
        self.accelerator.wait_for_everyone()


def _accelerator(config: TrainConfig, task: Task, model: nn.Module) -> Accelerator:
    # Accelerate keeps its precision for the life of the process; two runs in one process may differ in it.
    AcceleratorState._reset_state()
    # Looking for them costs a walk through each step's graph; without it DDP waits for their gradients.
    idle = any(isinstance(module, Adapter) and module.idles(module) for module in model.modules())
    ddp = DistributedDataParallelKwargs(find_unused_parameters=task.partial or idle)
    try:
        accelerator = Accelerator(mixed_precision=config.amp, kwargs_handlers=[ddp])
    except ValueError as error:
        raise InputError(f"amp={config.amp!r} does not work here: {error}") from error
    if config.amp == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would train in float32 and say nothing.
        raise InputError("amp='fp16' needs a GPU: on a CPU use 'bf16' or 'no'")
    return accelerator


def _limited(dataset: SizedDataset, config: TrainConfig) -> SizedDataset:
    size = len(dataset)
    if config.limit_train is None or config.limit_train >= size:
        return dataset
    # A stream of its own, apart from the epochs'.
    return Subset(cast(Any, dataset), sorted(permutation(size, config.seed, 1 << 32)[: config.limit_train]))


def _check_batches(num_images: int, config: TrainConfig, num_processes: int) -> None:
    if config.batch_size > num_images:
        raise InputError(f"batch_size {config.batch_size} is more than the {num_images} training images")
    share, left = divmod(config.batch_size, num_processes)
    if left:
        raise InputError(f"batch_size {config.batch_size} must be a multiple of the {num_processes} processes")
    if (config.mixup or config.cutmix) and share % 2:
        raise InputError(f"mixup and cutmix pair images: batch_size {config.batch_size} per process must be even")
