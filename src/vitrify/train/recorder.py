"""Averages what each step logs, and writes it down; also where a loss that is no longer finite is noticed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vitrify.errors import VitrifyError
from vitrify.nn.cores import TaylorSparse
from vitrify.train.config import TrainConfig
from vitrify.train.metrics import Display, Meter, MetricsLog

_DENSITY = "density/"


class Recorder:
    """The logs of a run. Scalars stay on the device until `flush`, so that steps need not wait for one another.

    Two means are kept: over the last `log_every` steps, and over the epoch. Use as a context manager.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        *,
        steps_per_epoch: int,
        total_steps: int,
        learning_rate: Callable[[int], float],
        sparse_cores: Mapping[str, TaylorSparse],
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._steps_per_epoch, self._total_steps = steps_per_epoch, total_steps
        self._learning_rate, self._sparse_cores = learning_rate, sparse_cores
        self._pending: list[dict[str, Tensor]] = []
        self._interval, self._epoch = Meter(), Meter()
        self._log: MetricsLog | None = None
        self._timed_from, self._timed_steps = 0.0, 0

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up the means where `state()` left them."""
        self._interval, self._epoch = Meter(**state["interval"]), Meter(**state["epoch"])

    def state(self) -> dict[str, Any]:
        """Return the means under way, as JSON values; flush first."""
        return {"interval": self._interval.state(), "epoch": self._epoch.state()}

    def start(self, folder: Path, step: int) -> Recorder:
        """Open metrics.jsonl after `step`, and the display."""
        if self._accelerator.is_main_process:
            self._log = MetricsLog(folder, step, tensorboard=self._config.tensorboard)
        self._display = Display(self._total_steps, step, enabled=self._accelerator.is_main_process)
        self._timed_from = time.monotonic()
        return self

    def __enter__(self) -> Recorder:
        self._display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._display.__exit__()
        if self._log is not None:
            self._log.close()

    def add(self, step: int, logs: Mapping[str, Tensor]) -> None:
        """Take the scalars of the step that ended with number `step`; every log_every steps, write a line."""
        density = {f"{_DENSITY}{name}": core.density.clone() for name, core in self._sparse_cores.items()}
        self._pending.append({**logs, **density})
        self._timed_steps += 1
        self._display.advance(step)
        if step % self._config.log_every == 0:
            self._write_interval(step)

    def flush(self, step: int) -> None:
        """Bring the scalars up to `step` to the CPU; the only synchronisation with the device.

        Raises VitrifyError naming the first step whose loss is not finite, and its learning rate.
        """
        if not self._pending:
            return
        names = list(self._pending[0])
        rows = torch.stack([torch.stack([logs[name].float() for name in names]) for logs in self._pending])
        first = step - len(self._pending)
        self._pending.clear()
        for index, row in enumerate(self._accelerator.reduce(rows, reduction="mean").tolist(), first):
            values = dict(zip(names, row, strict=True))
            if not math.isfinite(values["loss"]):
                raise VitrifyError(
                    f"the loss is {values['loss']} at step {index + 1} of {self._total_steps}, at a learning rate of "
                    f"{self._learning_rate(index):.3g}: try a lower lr, clip_grad, or amp='no'"
                )
            self._interval.add(values)
            self._epoch.add(values)

    def write_epoch(self, step: int, metrics: dict[str, float], *, skipped: int) -> None:
        """Write the line of the epoch that ended with `step`, and start the means of the next.

        `skipped` is the number of training images that could not be read so far.
        """
        self.flush(step)
        epoch = math.ceil(step / self._steps_per_epoch)
        means = self._epoch.means()
        self._write("epoch", step, {"epoch": epoch, "eval": metrics, "skipped": skipped}, means)
        shown = "".join(f", {name} {value:.4f}" for name, value in metrics.items())
        shown += f", {skipped} unreadable images skipped" if skipped else ""
        self._display.note(f"epoch {epoch}: training loss {means['loss']:.4f}{shown}", keep=True)
        self._epoch = Meter()

    def _write_interval(self, step: int) -> None:
        self.flush(step)
        # After resuming, the first mean includes steps of the run before; the speed does not.
        now = time.monotonic()
        speed = self._timed_steps * self._config.batch_size / (now - self._timed_from)
        self._timed_from, self._timed_steps = now, 0
        means = self._interval.means()
        line = {"epoch": step / self._steps_per_epoch, "lr": self._learning_rate(step - 1)}
        self._write("train", step, {**line, "images_per_s": round(speed, 1)}, means)
        self._display.note(f"step {step}: loss {means['loss']:.4f}, {speed:.0f} images/s")
        self._interval = Meter()

    def _write(self, kind: str, step: int, line: dict[str, Any], means: Mapping[str, float]) -> None:
        """Append a line: the scalars, and for each sparse core the threshold now and the mean density."""
        if self._log is None:
            return
        scalars = {name: value for name, value in means.items() if not name.startswith(_DENSITY)}
        sparse = {}
        if self._sparse_cores:
            density = {n.removeprefix(_DENSITY): v for n, v in means.items() if n.startswith(_DENSITY)}
            threshold = {name: float(core.threshold) for name, core in self._sparse_cores.items()}
            sparse = {"threshold": threshold, "density": density}
        self._log.write({"kind": kind, "step": step, **line, **scalars, **sparse})
