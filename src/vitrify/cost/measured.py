"""Times that `vitrify bench` measured on a target's machine, which take precedence over computed ones.

A result file is the machine's if its name ends in the target's `machine` (models-amd-epyc-2-cores.json), and if it ran
with as many threads as the target has; the target of another machine, or of another number of threads, has none. A row
is a case's if everything in the case is equal; what was refused has no time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitrify.cost.fusion import Fusion
from vitrify.cost.target_file import Target
from vitrify.errors import InputError

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_CONTENDERS = {"softmax": "SDPA", "taylor": "Taylor"}


@dataclass(frozen=True)
class Measured:
    """Seconds of one call, and its verdict against the original: "faster", "slower", "within noise"; "" for itself."""

    seconds: float
    verdict: str


@dataclass(frozen=True)
class Measurements:
    """The rows of one machine's result files: `attention-MACHINE.json` and `models-MACHINE.json`."""

    attention: tuple[Mapping[str, Any], ...] = ()
    models: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, folder: str | Path, target: Target) -> Measurements:
        """Read what the folder has of the target's machine; nothing if it has nothing. InputError for a faulty file."""
        return cls(**{name: _rows(Path(folder) / f"{name}-{target.machine}.json", target) for name in _FILES})

    def core_s(
        self,
        kind: Literal["softmax", "taylor"],
        *,
        tokens: int,
        instances: int,
        head_dim: int,
        dtype: str,
        fusion: Fusion,
    ) -> float | None:
        """Return the seconds of an attention core (batch times heads `instances`), or None if it was not measured.

        In the layout that models have: views of a packed projection.
        """
        name = f"{_CONTENDERS[kind]} packed{' compiled' if fusion == 'compiled' else ''}"
        for row in self.attention:
            case = row["case"]
            same = case["tokens"] == tokens and case["heads"] * case["batch_size"] == instances
            if (
                same
                and case["head_dim"] == head_dim
                and case["dtype"] == _DTYPES.get(dtype)
                and row["contender"] == name
            ):
                return _seconds(row)
        return None

    def model(
        self, model: str, *, image_size: int, batch_size: int, recipe: str, dtype: str, fusion: Fusion
    ) -> Measured | None:
        """Return the time of a whole model, "original" or as a recipe's name says, or None. They ran in float32."""
        name = f"{recipe}{' compiled' if fusion == 'compiled' else ''}"
        for row in self.models:
            case = row["case"]
            same = case["model"] == model and case["image_size"] == image_size and case["batch_size"] == batch_size
            if same and dtype == "fp32" and row["contender"] == name:
                return Measured(_seconds(row), (row["speedup"] or {}).get("verdict", ""))
        return None


_FILES = ("attention", "models")


def _rows(path: Path, target: Target) -> tuple[Mapping[str, Any], ...]:
    if not target.machine or not path.is_file():
        return ()
    try:
        data = json.loads(path.read_text("utf-8"))
        rows = tuple(row for row in data["rows"] if row["timing"] is not None)
        if "units.threads" in target and data["machine"]["threads"] != target.si("units.threads"):
            return ()
        # All that is read later, so that a faulty file is refused here.
        _ = [(row["contender"], row["case"]["batch_size"], _seconds(row)) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of `vitrify bench`: {type(error).__name__}: {error}") from error
    return rows


def _seconds(row: Mapping[str, Any]) -> float:
    return float(row["timing"]["median_ms"]) * 1e-3
