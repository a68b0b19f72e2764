"""What a benchmark is: seeded inputs, contenders that each carry their own check and cost, and a name to find it by.

A benchmark is a module with one function, `prepare(case) -> Prepared`. The case is plain JSON, so that the memory
measurement can prepare the same thing again in a fresh process, and so that the result file says exactly what ran.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from vitrify.bench.roofline import Cost
from vitrify.errors import unknown

Case = Mapping[str, Any]
Timed = Literal["graph", "loop", "call"]

BENCHMARKS = {
    "attention": "vitrify.bench.attention",
    "shift": "vitrify.bench.shift",
    "hamming": "vitrify.bench.hamming",
    "mixture": "vitrify.bench.mixture",
    "models": "vitrify.bench.models",
}


@dataclass(frozen=True)
class Check:
    """How far an output is from the float64 reference: largest absolute error over largest absolute reference value."""

    error: float
    tolerance: float
    against: str

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return f"error {self.error:.1e} (allowed {self.tolerance:.1e}) against {self.against}"


@dataclass(frozen=True)
class Contender:
    """One way to do the job. `check` runs it on one input and compares; what fails it is never timed.

    `timed` says how on a GPU: "graph", calls in a row, replayed from a CUDA graph; "loop", calls in a row, for what
    waits for the GPU itself and so cannot be captured; "call", one at a time with its launches, for whole models.
    """

    name: str
    run: Callable[[Any], object]
    check: Callable[[Any], Check]
    cost: Cost
    timed: Timed = "graph"


@dataclass(frozen=True)
class Prepared:
    """A benchmark made ready for one case. `inputs(seed)` draws a new random input on `device`, never zeros.

    `rotation`: how many inputs to rotate through. `baselines`: each contender and the one it is compared with.
    `not_run`: who else belongs here but cannot run on this machine, and why.
    """

    inputs: Callable[[int], Any]
    contenders: Sequence[Contender]
    baselines: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    rotation: int
    not_run: Mapping[str, str] = field(default_factory=dict)


def prepare(benchmark: str, case: Case) -> Prepared:
    """Prepare `case` of a benchmark by its name.

    Raises:
        InputError: there is no such benchmark, or the case names a model or size that does not exist.
    """
    if benchmark not in BENCHMARKS:
        raise unknown("benchmark", benchmark, BENCHMARKS)
    # Dynamo keeps a few graphs per function and then gives up; each case has its own shapes and wants its own.
    torch.compiler.reset()
    prepared: Prepared = importlib.import_module(BENCHMARKS[benchmark]).prepare(case)
    return prepared
