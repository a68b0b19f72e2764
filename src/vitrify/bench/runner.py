"""Check, then time, then weigh: the order that every benchmark goes through."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vitrify.bench import gpu_timing, memory, registry, roofline
from vitrify.bench.machine import Machine, describe
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.timing import Speedup, Timer, Timing, single_calls, speedup, take_turns
from vitrify.files import write_atomically

Progress = Callable[[str], None]
_TURNS = "contenders interleaved, order and inputs rotated, warm-up before; ms of one call"
TIMING_METHODS = {"cpu": _TURNS, "cuda": f"{_TURNS}, each contender's as `timed` says: {gpu_timing.METHOD}"}


@dataclass(frozen=True)
class Row:
    """One contender in one case. One that was wrong (`refused`) or is not to be had (`not_run`) has no timing."""

    case: dict[str, object]
    contender: str
    cost: roofline.Cost | None
    check: Check | None = None
    refused: str | None = None
    not_run: str | None = None
    timing: Timing | None = None
    timed: str | None = None
    baseline: str | None = None
    speedup: Speedup | None = None
    peak_mib: float | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the row as JSON-ready values."""
        return {
            "case": self.case,
            "contender": self.contender,
            "refused": self.refused,
            "not_run": self.not_run,
            "check": self.check and asdict(self.check),
            "timing": self.timing and asdict(self.timing),
            "timed": self.timed,
            "speedup": self.speedup and {"over": self.baseline, **self.speedup.to_dict()},
            "peak_mib": self.peak_mib,
            "flops": self.cost and self.cost.flops,
            "narrow_flops": self.cost and dict(self.cost.narrow),
            "bytes_moved": self.cost and self.cost.bytes_moved,
        }


@dataclass(frozen=True)
class Result:
    """What `run` measured, where and how; `rows` in the order of cases and contenders."""

    benchmark: str
    machine: Machine
    seed: int
    seconds_per_case: float
    roofline: roofline.Roofline
    memory_method: str
    command: str
    rows: Sequence[Row]

    @property
    def refusals(self) -> list[Row]:
        """The rows whose output was wrong, or which did not run."""
        return [row for row in self.rows if row.refused]

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON-ready values."""
        return {
            "benchmark": self.benchmark,
            "command": self.command,
            "machine": asdict(self.machine),
            "seed": self.seed,
            "seconds_per_case": self.seconds_per_case,
            "timing_method": TIMING_METHODS["cuda" if self.machine.device.startswith("cuda") else "cpu"],
            "memory_method": self.memory_method,
            "roofline": asdict(self.roofline),
            "rows": [
                {**row.to_dict(), "floor_ms": self.roofline.floor_ms(row.cost) if row.cost else None}
                for row in self.rows
            ],
        }

    def write(self, folder: Path) -> Path:
        """Write `<folder>/<benchmark>-<machine>.json`, whole or not at all; return its path."""
        path = folder / f"{self.benchmark}-{self.machine.slug}.json"
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path


def run(
    benchmark: str,
    cases: Sequence[Case],
    *,
    seconds: float,
    seed: int = 0,
    command: str = "",
    progress: Progress = lambda message: None,
) -> Result:
    """Run a benchmark over its cases: each contender is checked, then all that passed are timed together and weighed.

    Args:
        benchmark: a name in `registry.BENCHMARKS`.
        cases: at least one, all on one device and dtype and with the same contenders.
        seconds: how long to time each case; a round of slow contenders may make it longer (`timing.MIN_ROUNDS`).
        seed: seeds the inputs.
        command: what to record as the command that gives these numbers again.
        progress: called with a line of text before each step.
    """
    prepared = registry.prepare(benchmark, cases[0])
    machine = describe(prepared.device)  # before anything loads the machine
    progress("probing memory bandwidth and arithmetic")
    narrow = {name for contender in prepared.contenders for name in contender.cost.narrow}
    limits = roofline.probe(prepared.device, prepared.dtype, narrow)
    rows = []
    for case in cases:
        rows.extend(_run_case(benchmark, case, seconds=seconds, seed=seed, progress=progress))
    progress("probing again, in case the machine was busy the first time")
    limits = limits.best(roofline.probe(prepared.device, prepared.dtype, narrow))
    method = memory.METHODS["cuda" if prepared.device.type == "cuda" else "resident"]
    return Result(benchmark, machine, seed, seconds, limits, method, command, rows)


def _run_case(benchmark: str, case: Case, *, seconds: float, seed: int, progress: Progress) -> list[Row]:
    label = " ".join(f"{key}={value}" for key, value in case.items())
    prepared = registry.prepare(benchmark, case)
    inputs = [prepared.inputs(seed + index) for index in range(prepared.rotation)]
    checks: dict[str, Check | str] = {}
    for contender in prepared.contenders:
        progress(f"checking {contender.name}: {label}")
        checks[contender.name] = _check(contender, inputs[0])
    sound = [c for c in prepared.contenders if isinstance(check := checks[c.name], Check) and check.passed]
    progress(f"timing {len(sound)} contenders: {label}")
    timers: dict[str, Timer] = {}
    timed: dict[str, str] = {}
    for c in sound:
        try:
            timers[c.name], timed[c.name] = _timer(c, inputs, prepared.device)
        except Exception as error:
            checks[c.name] = _why(error)
    samples = take_turns(timers, seconds=seconds)
    rows = []
    for contender in prepared.contenders:
        check, own = checks[contender.name], samples.get(contender.name)
        baseline = prepared.baselines[contender.name]
        compared = own is not None and baseline != contender.name and baseline in samples
        if own is not None:
            progress(f"weighing {contender.name}: {label}")
        rows.append(
            Row(
                case=dict(case),
                contender=contender.name,
                cost=contender.cost,
                check=check if isinstance(check, Check) else None,
                refused=None if own is not None else f"not timed: {check}",
                timing=Timing.of(own) if own is not None else None,
                timed=timed.get(contender.name),
                baseline=baseline if compared else None,
                speedup=speedup(samples[baseline], own) if compared and own is not None else None,
                peak_mib=_peak(benchmark, case, contender, prepared, inputs[0], seed) if own is not None else None,
            )
        )
    absent = (Row(dict(case), name, cost=None, not_run=why) for name, why in prepared.not_run.items())
    return [*rows, *absent]


def _check(contender: Contender, argument: object) -> Check | str:
    try:
        return contender.check(argument)
    except Exception as error:  # one contender that cannot run here must not end the others, whatever it raises
        return _why(error)


def _timer(contender: Contender, inputs: Sequence[object], device: torch.device) -> tuple[Timer, str]:
    if device.type != "cuda":
        return single_calls(contender.run, inputs, device), "single calls"
    timer, how = gpu_timing.timer(contender, inputs, device)
    timer(0)
    return timer, how


def _why(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}"


def _peak(benchmark: str, case: Case, contender: Contender, prepared: Prepared, argument: object, seed: int) -> float:
    if prepared.device.type == "cuda":
        return memory.cuda_peak_mib(lambda: contender.run(argument), prepared.device)
    request = {
        "benchmark": benchmark,
        "case": dict(case),
        "contender": contender.name,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    return memory.resident_peak_of("vitrify.bench.weigh", request)
