"""Timing that compares: contenders take turns on the same inputs, so that drift and noise hit all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import torch

MIN_ROUNDS, MAX_ROUNDS = 7, 200
"""Six rounds are the fewest for which `median_interval` reaches 95 %; seven have a middle one."""

Input = TypeVar("Input")
Timer = Callable[[int], float]
"""Times one contender in round `turn`: milliseconds of one call."""
Verdict = Literal["faster", "slower", "within noise"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over `rounds` timed calls: the median, the extremes and the 10th and 90th percentile."""

    median_ms: float
    min_ms: float
    p10_ms: float
    p90_ms: float
    rounds: int

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Timing:
        """Summarise samples in milliseconds (at least one)."""
        return cls(
            median_ms=statistics.median(samples_ms),
            min_ms=min(samples_ms),
            p10_ms=quantile(samples_ms, 0.1),
            p90_ms=quantile(samples_ms, 0.9),
            rounds=len(samples_ms),
        )


@dataclass(frozen=True)
class Speedup:
    """How often a contender is as fast as the baseline, from the ratios of the calls made in the same round.

    `ratio` is the median of baseline time / contender time (above 1 the contender is faster), `p10` and `p90` its
    spread over the rounds, `low` and `high` the 95 % confidence interval of the median, which decides the verdict.
    """

    ratio: float
    p10: float
    p90: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """'faster' or 'slower' only where the whole interval of the median lies on one side of 1."""
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "within noise"

    def to_dict(self) -> dict[str, float | str]:
        """Return the fields and the verdict as JSON-ready values."""
        return {**asdict(self), "verdict": self.verdict}


def speedup(baseline_ms: Sequence[float], contender_ms: Sequence[float]) -> Speedup:
    """Compare two contenders' samples, paired by round."""
    ratios = [base / own for base, own in zip(baseline_ms, contender_ms, strict=True)]
    low, high = median_interval(ratios)
    return Speedup(statistics.median(ratios), quantile(ratios, 0.1), quantile(ratios, 0.9), low, high)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return an interval that covers the median with at least 95 % confidence, whatever the distribution.

    The k-th smallest and the k-th largest sample, k from the binomial distribution. With fewer than six samples no
    such interval exists, and the extremes are returned.
    """
    ordered, n = sorted(samples), len(samples)
    index, tail = 0, 0.5**n
    while (tail := tail + math.comb(n, index + 1) * 0.5**n) <= 0.025:
        index += 1
    return ordered[index], ordered[n - 1 - index]


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the `q`-quantile (0 to 1) by linear interpolation."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    lower = math.floor(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (ordered[upper] - ordered[lower]) * (position - lower)


def interleave(
    contenders: Mapping[str, Callable[[Input], object]],
    inputs: Sequence[Input],
    *,
    seconds: float,
    device: torch.device,
) -> dict[str, list[float]]:
    """Time every contender once per round, in an order and on inputs that rotate; return milliseconds per call.

    Args:
        contenders: name -> what is timed; the result is dropped.
        inputs: at least one; round r uses input r modulo their number, so no contender finds its input in cache
            because it ran last.
        seconds: the time to spend; between `MIN_ROUNDS` and `MAX_ROUNDS` rounds are made whatever it says.
        device: where the code runs; CUDA is synchronised around every call.
    """
    return take_turns({name: single_calls(run, inputs, device) for name, run in contenders.items()}, seconds=seconds)


def single_calls(run: Callable[[Input], object], inputs: Sequence[Input], device: torch.device) -> Timer:
    """Return what times one call on input `turn` modulo their number: on CUDA with its launches, and synchronised."""
    return lambda turn: _time_ms(run, inputs[turn % len(inputs)], device)


def take_turns(timers: Mapping[str, Timer], *, seconds: float) -> dict[str, list[float]]:
    """Ask every timer once per round, in an order that rotates; return their milliseconds. See `interleave`."""
    names = list(timers)
    if not names:
        return {}
    spent = 0.0
    for name in names:  # warm-up: code pages, thread pools, cuDNN choices, compilation
        timers[name](0)
        begin = time.perf_counter()
        timers[name](0)
        spent += time.perf_counter() - begin
    rounds = int(min(max(seconds / max(spent, 1e-6), MIN_ROUNDS), MAX_ROUNDS))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timers[name](turn))
    return samples


def _time_ms(run: Callable[[Input], object], argument: Input, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = _event(), _event()
        torch.cuda.synchronize(device)
        start.record()
        run(argument)
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    run(argument)
    return (time.perf_counter() - begin) * 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
