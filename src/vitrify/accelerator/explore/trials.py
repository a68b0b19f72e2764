"""What an exploration finds: trials, what they are judged by, the best of them, and the Pareto front."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from vitrify.accelerator.explore.space import Design, Space, show
from vitrify.accelerator.hardware import Hardware
from vitrify.accelerator.result import Result
from vitrify.errors import InputError, unknown

QUANTITIES: Mapping[str, Callable[[Result], float]] = {
    "latency_ms": lambda result: result.seconds * 1e3,
    "energy_mj": lambda result: result.total_pj * 1e-9,
    "chip_mj": lambda result: (result.total_pj - result.energy_pj["dram"]) * 1e-9,
    "edp_mj_ms": lambda result: result.total_pj * 1e-9 * result.seconds * 1e3,
    "power_w": lambda result: result.total_pj * 1e-12 / result.seconds,
    "total_mm2": lambda result: result.total_mm2,
    "cycles": lambda result: result.cycles,
}
"""Of one forward pass. Energy and power with the DRAM's part, chip_mj without; nobody charges leakage."""
OBJECTIVES: Mapping[str, str] = {
    "latency": "latency_ms",
    "energy": "energy_mj",
    "edp": "edp_mj_ms",
    "power": "power_w",
    "area": "total_mm2",
}
"""The quantity that each makes least."""

Status = Literal["done", "refused", "failed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a design.

    status       "done"; "refused": the simulator says that it cannot be; "failed": the simulator broke
    quantities   those of QUANTITIES, if it is done
    tiles        how its layers are cut; `simulate` chose that
    reason       why it is not done
    notes        what a reader must know of the simulation
    """

    status: Status
    quantities: Mapping[str, float] = field(default_factory=dict)
    tiles: str = ""
    reason: str = ""
    notes: Sequence[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trial(Outcome):
    """A design, its values by axis, and what became of it."""

    design: Design


@dataclass(frozen=True)
class Constraint:
    """A quantity and its limit: at most (or at least) that."""

    quantity: str
    at_most: bool
    limit: float

    def excess(self, quantities: Mapping[str, float]) -> float:
        """Return by which part of the limit it is broken; 0 or less if it is kept."""
        beyond = (quantities[self.quantity] - self.limit) / abs(self.limit or 1.0)
        return beyond if self.at_most else -beyond

    def __str__(self) -> str:
        """Write it as `read_constraint` reads it."""
        return f"{self.quantity}{'<=' if self.at_most else '>='}{self.limit:g}"


def read_constraint(text: str) -> Constraint:
    """Return the constraint that "total_mm2<=3" says; InputError for anything else, by what is wrong with it."""
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*", text)
    try:
        quantity, sign, limit = (match[1], match[2], float(match[3])) if match else ("", "", math.nan)
        if not math.isfinite(limit):
            raise ValueError
    except ValueError:
        raise InputError(
            f"a constraint is QUANTITY<=NUMBER or QUANTITY>=NUMBER, 'total_mm2<=3', not {text!r}"
        ) from None
    if quantity in OBJECTIVES:
        raise InputError(f"constraint {text!r}: which unit? {quantity} is {OBJECTIVES[quantity]} here")
    if quantity not in QUANTITIES:
        raise unknown(f"quantity in constraint {text!r}:", quantity, QUANTITIES)
    return Constraint(quantity, sign == "<=", limit)


def read_objectives(text: str) -> tuple[str, ...]:
    """Return the quantities that "latency" or "latency,energy" makes least; InputError for others, or more than two."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OBJECTIVES:
            raise unknown("objective", name, OBJECTIVES)
    if len(names) > 2 or len(set(names)) < len(names):
        raise InputError(f"one objective, or two different ones with a comma between, not {text!r}")
    return tuple(OBJECTIVES[name] for name in names)


@dataclass(frozen=True)
class Exploration:
    """What was found.

    hardware      the start
    start         the start as a trial; it counts neither for `best` nor for `front`
    trials        in the order in which the sampler asked for them
    objectives    one or two quantities
    """

    hardware: Hardware
    space: Space
    objectives: Sequence[str]
    constraints: Sequence[Constraint]
    start: Trial
    trials: Sequence[Trial]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the simulations."""
        return list(dict.fromkeys(note for trial in (self.start, *self.trials) for note in trial.notes))

    def keeps(self, trial: Trial) -> bool:
        """Say whether a trial is done and keeps to all constraints."""
        return trial.status == "done" and not self.broken(trial)

    def broken(self, trial: Trial) -> list[str]:
        """Return the constraints that a trial breaks, as text; none if it is not done."""
        return [str(c) for c in self.constraints if trial.quantities and c.excess(trial.quantities) > 0]

    @property
    def best(self) -> Trial | None:
        """The trial with the least objective, of two objectives the least product, that keeps to the constraints."""

        def product(trial: Trial) -> float:
            first, second = (self.objectives[0], self.objectives[-1])
            return trial.quantities[first] * (trial.quantities[second] if second != first else 1.0)

        return min(filter(self.keeps, self.trials), key=product, default=None)

    @property
    def plane(self) -> tuple[str, str]:
        """The two quantities of the front: both objectives, or the one against area (area against latency)."""
        if len(self.objectives) == 2:
            return self.objectives[0], self.objectives[1]
        other = "latency_ms" if self.objectives[0] == "total_mm2" else "total_mm2"
        return self.objectives[0], other

    @cached_property
    def front(self) -> list[Trial]:
        """The trials that no other one beats in both quantities of `plane`, along the first; of equals the first."""
        x, y = self.plane
        kept = sorted(filter(self.keeps, self.trials), key=lambda trial: (trial.quantities[x], trial.quantities[y]))
        found: list[Trial] = []
        for trial in kept:
            if not found or trial.quantities[y] < found[-1].quantities[y]:
                found.append(trial)
        return found

    def hardware_of(self, trial: Trial, name: str) -> Hardware:
        """Return the hardware that one of `trials` stands for, under a name."""
        point = tuple(values.index(trial.design[axis]) for axis, values in self.space.axes.items())
        title = f"{self.hardware.title}, with {', '.join(f'{k} {show(v)}' for k, v in trial.design.items())}"
        return replace(self.hardware.with_(self.space.changes(point), name), title=title)

    def to_csv(self) -> str:
        """Return a line for each trial, the start being number 0: design, quantities, and what became of it."""
        text = io.StringIO()
        columns = ["trial", *self.space.axes, "status", "keeps_constraints", "on_front", *QUANTITIES, "tiles", "reason"]
        writer: csv.DictWriter[str] = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        front = {id(trial) for trial in self.front}
        for number, trial in enumerate((self.start, *self.trials)):
            row: dict[str, Any] = {axis: show(value) for axis, value in trial.design.items()}
            row |= {"trial": number, "status": trial.status, "tiles": trial.tiles, "reason": trial.reason}
            row |= {"keeps_constraints": _word(self.keeps(trial)), "on_front": _word(id(trial) in front)}
            writer.writerow(row | dict(trial.quantities))
        return text.getvalue()


def _word(yes: bool) -> str:
    return "yes" if yes else "no"
