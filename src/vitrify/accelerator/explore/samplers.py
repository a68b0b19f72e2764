"""Which points of a space to try: all, random ones, or those that Optuna's samplers ask for.

A sampler is a generator: it yields points, is sent their trials, and returns when it has no more. What it asks for
follows from its seed and the trials alone, never from how many workers there were or who was first. So a sampler that
is asked again and told what is known already arrives where it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from vitrify.accelerator.explore.space import Point, Space
from vitrify.accelerator.explore.trials import Constraint, Trial
from vitrify.errors import InputError, optional, unknown

if TYPE_CHECKING:
    import optuna

SamplerName = Literal["random", "grid", "optuna"]
Sampler = Generator[Sequence[Point], Sequence[Trial], None]

DEFAULT_TRIALS = 100
_LARGEST_GRID = 100_000
# How many points Optuna's samplers ask for before they see a result. Not the number of workers, on which a result
# must not depend; and a population of NSGA-II.
_ROUND = 16
# How often they may ask for what is known already before they count as having nothing new.
_PATIENCE = 10
_WORST = 1e30


def count_trials(name: str, space: Space, trials: int | None) -> int:
    """Return how many designs a sampler will try at most; InputError for a sampler or number that cannot be."""
    if name not in get_args(SamplerName):
        raise unknown("sampler", name, get_args(SamplerName))
    if name == "grid":
        if trials is not None:
            raise InputError(
                f"a grid tries all {space.size:,} designs, not {trials}: leave trials out, or try 'random'"
            )
        if space.size > _LARGEST_GRID:
            raise InputError(f"this grid has {space.size:,} designs, above {_LARGEST_GRID:,}: try 'random' or 'optuna'")
        return space.size
    if trials is not None and trials < 1:
        raise InputError(f"trials must be at least 1, not {trials}")
    return min(trials or DEFAULT_TRIALS, space.size)


def start(
    name: SamplerName,
    space: Space,
    trials: int,
    seed: int,
    objectives: Sequence[str],
    constraints: Sequence[Constraint],
) -> Sampler:
    """Return a sampler for so many different points.

    With a larger number of trials the first ones are the same. Raises InputError if Optuna is asked for and not there.
    """
    if name == "grid":
        return _at_once([space.point(index) for index in range(space.size)])
    if name == "random":
        return _at_once(_draw(space, trials, seed))
    return _rounds(space, trials, _study(seed, len(objectives)), _judge(objectives, constraints))


def version(name: str) -> str:
    """Return the version that a sampler's choices depend on; "" for our own."""
    if name != "optuna":
        return ""
    with optional("optuna", "explore", "the sampler 'optuna'"):
        import optuna  # noqa: PLC0415  (an extra)
    return str(optuna.__version__)


def _at_once(points: Sequence[Point]) -> Sampler:
    yield points


def _draw(space: Space, trials: int, seed: int) -> list[Point]:
    drawn: dict[int, None] = {}
    numbers = random.Random(seed)
    while len(drawn) < trials:
        drawn.setdefault(numbers.randrange(space.size))
    return [space.point(index) for index in drawn]


def _study(seed: int, objectives: int) -> optuna.Study:
    """Return a study in memory: TPE for one objective, NSGA-II for two."""
    import optuna  # noqa: PLC0415  (an extra; `version` has said so if it is not there)

    sampler: optuna.samplers.BaseSampler
    if objectives == 1:
        sampler = optuna.samplers.TPESampler(seed=seed)
    else:
        sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=_ROUND)
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    finally:
        optuna.logging.set_verbosity(loud)


Tell = Callable[[Any, Trial], list[float]]


def _judge(objectives: Sequence[str], constraints: Sequence[Constraint]) -> Tell:
    """Return what sets the constraints of Optuna's trial from ours, and returns the values to tell it."""

    def judge(asked: Any, trial: Trial) -> list[float]:
        done = trial.status == "done"
        asked.set_constraint("done", 0.0 if done else 1.0)
        for constraint in constraints:
            asked.set_constraint(str(constraint), constraint.excess(trial.quantities) if done else 0.0)
        return [trial.quantities[name] if done else _WORST for name in objectives]

    return judge


def _rounds(space: Space, trials: int, study: optuna.Study, judge: Tell) -> Sampler:
    known: dict[Point, Trial] = {}
    while len(known) < trials:
        wanted = min(_ROUND, trials - len(known))
        fresh: dict[Point, list[optuna.Trial]] = {}
        for _ in range(_PATIENCE * wanted):
            asked = study.ask()
            point = _suggest(asked, space)
            if point in known:
                study.tell(asked, judge(asked, known[point]))
            else:
                fresh.setdefault(point, []).append(asked)
            if len(fresh) == wanted:
                break
        if not fresh:
            return
        for point, trial in zip(fresh, (yield list(fresh)), strict=True):
            known[point] = trial
            for asked in fresh[point]:
                study.tell(asked, judge(asked, trial))


def _suggest(asked: optuna.Trial, space: Space) -> Point:
    """Return the point that Optuna asks for: numbers are in order for it, words are not."""
    found = []
    for axis, values in space.axes.items():
        last = len(values) - 1
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            found.append(asked.suggest_int(axis, 0, last))
        else:
            found.append(asked.suggest_categorical(axis, range(last + 1)))
    return tuple(found)
