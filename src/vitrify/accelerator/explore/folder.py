"""The folder of an exploration: which one it holds, and the trials that are finished.

exploration.json   what is explored: model, hardware, space, sampler, seed
trials.jsonl       a line for each finished simulation, in the order in which they finished
trials.csv, pareto.png, best.yaml   the results, written at the end
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitrify.accelerator.explore.space import Design, differences, key
from vitrify.accelerator.explore.trials import Outcome
from vitrify.errors import InputError, VitrifyError
from vitrify.files import write_atomically

FORMAT = "vitrify-exploration"
_CONFIG, _TRIALS = "exploration.json", "trials.jsonl"


class Folder:
    """The finished simulations of one exploration, on disk and in `known`, by the key of their design."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.known: dict[str, Outcome] = {}
        self._descriptor = descriptor
        self._read()

    def add(self, design: Design, outcome: Outcome) -> None:
        """Write a line, which is there whole or not at all, and wait until it is on the disk."""
        line = json.dumps({"design": design, **asdict(outcome)}) + "\n"
        try:
            os.write(self._descriptor, line.encode())
            os.fsync(self._descriptor)
        except OSError as error:
            raise VitrifyError(f"could not write {self.path / _TRIALS}: {error.strerror or error}") from error
        self.known[key(design)] = outcome

    def _read(self) -> None:
        file = self.path / _TRIALS
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        # A machine that lost its power may leave half a line.
        os.ftruncate(self._descriptor, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                data = json.loads(line)
                design = data.pop("design")
                outcome = Outcome(**data)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise VitrifyError(
                    f"{file}, line {number} is no trial: remove that line, and it is done again"
                ) from None
            # What failed may have been repaired since.
            if outcome.status != "failed":
                self.known[key(design)] = outcome


@contextmanager
def opened(path: str | Path, identity: Mapping[str, Any]) -> Iterator[Folder]:
    """Give the folder, made or found, and hold it against other processes.

    Raises InputError if it holds another exploration, naming what differs, or anything that is none, or if another
    process is at work in it. Then nothing is changed.
    """
    path = Path(path)
    config = path / _CONFIG
    content = json.dumps({"format": FORMAT, **identity}, indent=1) + "\n"
    _check(path, json.loads(content))
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / _TRIALS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise InputError(f"cannot write to the output folder {path}: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process explores in {path} right now") from None
        if not config.exists():
            write_atomically(config, content)
        yield Folder(path, descriptor)
    finally:
        os.close(descriptor)


def _check(path: Path, identity: dict[str, Any]) -> None:
    if path.exists() and not path.is_dir():
        raise InputError(f"the output {path} is a file: give a folder")
    # A process killed before it wrote its config leaves no more than empty trials.
    entries = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if not entries or (entries == [_TRIALS] and not (path / _TRIALS).stat().st_size):
        return
    try:
        stored = json.loads((path / _CONFIG).read_text())
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise InputError(f"{path} holds {entries[0]}, but is not the folder of an exploration: choose another")
    if changed := differences(stored, identity):
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise InputError(f"{path} holds another exploration. {'; '.join(changed[:4])}{more}. Choose another folder")
