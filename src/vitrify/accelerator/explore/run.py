"""`explore`: simulate a workload on many designs, and keep what was found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitrify import __version__
from vitrify.accelerator.explore import samplers
from vitrify.accelerator.explore.folder import Folder, opened
from vitrify.accelerator.explore.samplers import Sampler, SamplerName
from vitrify.accelerator.explore.space import Design, Point, Space, key, read
from vitrify.accelerator.explore.trials import Exploration, Outcome, Trial, read_constraint, read_objectives
from vitrify.accelerator.explore.workers import Changes, Run, Task, working
from vitrify.accelerator.hardware import Hardware, describe, load
from vitrify.accelerator.simulate import Objective
from vitrify.cost.graph import Workload
from vitrify.cost.serialise import to_json
from vitrify.cost.tables import FOLDER as TABLES
from vitrify.errors import InputError
from vitrify.files import write_atomically

Progress = Callable[[int, int, Outcome], None]
"""Told after each trial: how many are done (those of an earlier run too), of how many at most, and the outcome."""
_SIMULATOR = Path(__file__).parent.parent
_TILES_BY: Mapping[str, Objective] = {"latency_ms": "latency", "energy_mj": "energy", "edp_mj_ms": "edp"}


def explore(
    workload: Workload,
    hardware: str | Path | Hardware,
    space: str | Path | Mapping[str, Any] | Space,
    output: str | Path,
    *,
    objective: str = "latency",
    constraints: Sequence[str] = (),
    sampler: SamplerName = "random",
    trials: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress = lambda done, total, outcome: None,
) -> Exploration:
    """Return what designs of a space cost, each simulated with the workload; `output` gets trials.csv.

    hardware     the start: a preset by name, a description by path, or one loaded and changed
    space        a YAML or JSON file, or its data: {place of the hardware: values}; see `space.read`
    output       a folder. Each finished trial is there at once; the same call goes on where an earlier one was stopped
    objective    "latency", "energy", "edp", "power", "area", or two of them with a comma: what to make least. The
                 first of them that `simulate` knows also chooses how each design's layers are cut; else latency does
    constraints  "total_mm2<=3", "power_w<=1.5", ...: see `trials.QUANTITIES`
    sampler      "random", "grid", or "optuna" (extra `explore`): TPE, for two objectives NSGA-II
    trials       how many different designs the sampler tries, 100 by default; a grid tries all
    workers      so many processes, by default this one alone. More need a script whose work stands under
                 `if __name__ == "__main__":`. With `ray` so many designs at a time, by default two for each core
    ray          the address of a cluster, "auto", or "local" (extra `ray`); its nodes need vitrify

    The same seed gives the same trials whatever the workers. A design that the simulator refuses is a trial, too, with
    the reason. Raises InputError for bad input, and an `output` that holds anything else, naming what differs.
    """
    start = load(hardware)
    chosen = read(space, start)
    objectives = read_objectives(objective)
    limits = [read_constraint(text) for text in constraints]
    total = samplers.count_trials(sampler, chosen, trials)
    version = samplers.version(sampler)
    if workers is not None and workers < 1:
        raise InputError(f"workers must be at least 1, not {workers}")
    task = Task(workload, start, next((_TILES_BY[name] for name in objectives if name in _TILES_BY), "latency"))
    identity = {
        "vitrify": __version__,
        "simulator": _source(),
        "model": f"{workload.model}, input {' x '.join(map(str, workload.input_shape))}",
        "workload": hashlib.sha256(to_json(workload).encode()).hexdigest()[:16],
        "hardware": describe(start),
        "space": chosen.axes,
        "tiles by": task.tiles_by,
        "sampler": sampler,
        # What Optuna asks for next depends on these.
        **({"optuna": version, "objective": objectives, "constraints": sorted(constraints)} if version else {}),
        **({} if sampler == "grid" else {"seed": seed}),
    }
    # The cluster first: an address that is wrong leaves no folder behind.
    with working(task, workers, ray) as run, opened(output, identity) as folder:
        search = _Search(folder, run, chosen, total, progress)
        asked = samplers.start(sampler, chosen, total, seed, objectives, limits)
        # Beside the first designs, so that no worker waits for it alone.
        begin: tuple[Design, Changes] = (chosen.design_of(start), {})
        found: list[Trial] = []
        points = next(asked, None)
        while points is not None:
            fresh = search.simulate(points, begin)
            found += fresh
            points = _send(asked, fresh)
        started = search.trial(begin[0])
        exploration = Exploration(start, chosen, objectives, limits, started, found)
        write_atomically(folder.path / "trials.csv", exploration.to_csv())
    return exploration


def _source() -> str:
    """Return a digest of the simulator and its tables: results of two versions must not stand in one file."""
    files = [*_SIMULATOR.glob("*.py"), *TABLES.glob("*.yaml")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:16]


def _send(sampler: Sampler, trials: Sequence[Trial]) -> Sequence[Point] | None:
    try:
        return sampler.send(trials)
    except StopIteration:
        return None


class _Search:
    """Simulates designs unless the folder knows them, and puts them there."""

    def __init__(self, folder: Folder, run: Run, space: Space, total: int, progress: Progress) -> None:
        self._folder, self._run, self._space, self._progress = folder, run, space, progress
        self._done, self._total = 0, total

    def simulate(self, points: Sequence[Point], also: tuple[Design, Changes]) -> list[Trial]:
        """Return the points' trials. also: another design, and its values by place, to be simulated with them."""
        designs = {key(design): design for design in map(self._space.design, points)}
        changes = dict(zip(designs, map(self._space.changes, points), strict=True))
        for name in designs:
            if (outcome := self._folder.known.get(name)) is not None:
                self._tell(outcome)
        todo = {key(also[0]): also} | {name: (design, changes[name]) for name, design in designs.items()}
        missing = [(name, *todo[name]) for name in todo if name not in self._folder.known]
        for number, outcome in self._run([changed for _, _, changed in missing]):
            name, design, _ = missing[number]
            self._folder.add(design, outcome)
            if name in designs:
                self._tell(outcome)
        return [self.trial(design) for design in designs.values()]

    def trial(self, design: Design) -> Trial:
        """Return the trial of a design that was simulated."""
        return Trial(design=design, **vars(self._folder.known[key(design)]))

    def _tell(self, outcome: Outcome) -> None:
        self._done += 1
        self._progress(self._done, self._total, outcome)
