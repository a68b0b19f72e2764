"""What a run says while it goes: metrics.jsonl, a progress bar, and TensorBoard if asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vitrify.errors import InputError, VitrifyError
from vitrify.files import write_atomically


class Meter:
    """Running means of scalars; its state is plain numbers, so that a resumed run's means come out the same."""

    def __init__(self, sums: dict[str, float] | None = None, count: int = 0) -> None:
        self.sums = dict(sums or {})
        self.count = count

    def add(self, values: dict[str, float]) -> None:
        """Count one step."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def means(self) -> dict[str, float]:
        """Return the means; empty before the first step."""
        return {name: total / self.count for name, total in self.sums.items()} if self.count else {}

    def state(self) -> dict[str, Any]:
        """Return what the constructor takes."""
        return {"sums": self.sums, "count": self.count}


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl; lines after `step` are dropped first: they will come again.

    Raises InputError if TensorBoard is asked for and not installed, VitrifyError if the disk is full.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False) -> None:
        self._writer = _summary_writer(folder / "tensorboard", step) if tensorboard else None
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self._path) if line["step"] <= step] if step else []
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append `line`, which holds at least "kind" and "step"."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise VitrifyError(f"could not write {self._path}: {error}") from error
        if self._writer is not None:
            for name, value in _flat(line):
                self._writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def close(self) -> None:
        """Flush what TensorBoard has buffered."""
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line cut short by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Display:
    """A progress bar on a terminal, plain lines elsewhere, nothing in all processes but the first."""

    def __init__(self, total_steps: int, first_step: int, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=first_step, note="")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def note(self, text: str, *, keep: bool = False) -> None:
        """Show `text`: beside the bar, or for good with `keep`; without a bar, always as a line."""
        if self._bar is None:
            self.say(text)
        elif keep:
            self._bar.console.print(text, highlight=False)
        else:
            self._bar.update(self._task, note=text)

    def say(self, text: str) -> None:
        """Print a line to standard error."""
        if self._enabled:
            print(text, file=sys.stderr, flush=True)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            flat.append((prefix + name, float(value)))
    return flat


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (an optional extra)
    except ImportError as error:
        raise InputError("tensorboard=True needs TensorBoard: pip install 'vitrify[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=step + 1)
