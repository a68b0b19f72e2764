"""Schedules: pure functions of the step, so that a resumed run needs nothing but its step number."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vitrify.errors import InputError
from vitrify.nn.cores import TaylorSparse

# The rising threshold, as shares of the training: softmax, then the rise, then Taylor alone.
_SOFTMAX_UNTIL = 0.1
_TAYLOR_FROM = 0.75
# Where the rise begins and ends, in multiples of uniform attention 1/n: at the first nearly every entry is kept; at the
# second about one in forty is (experiments/vitality), so that going on would only repeat Taylor attention.
_FIRST_MULTIPLE, _LAST_MULTIPLE = 0.1, 10.0
# Above any probability: an empty mask, even where a saturated softmax rounds to 1.
_EMPTY = 2.0


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, floor: float) -> float:
    """Return the learning rate of `step` (from 0): linear warm-up to `peak`, then half a cosine down to `floor`."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * progress))


def rising_threshold(progress: float, num_keys: int) -> float:
    """Return the mask threshold T (a probability) at `progress` in [0, 1] of the training, for `num_keys` tokens.

    0 in the first tenth (softmax attention exactly), then geometric from 0.1/n to 10/n (1 if n is less than 10), and
    from three quarters on 2, which no probability reaches: Taylor attention exactly. Geometric, because attention is
    spread over decades: T n, the multiple of uniform attention, is the natural scale.
    """
    if progress < _SOFTMAX_UNTIL:
        return 0.0
    if progress >= _TAYLOR_FROM:
        return _EMPTY
    risen = (progress - _SOFTMAX_UNTIL) / (_TAYLOR_FROM - _SOFTMAX_UNTIL)
    last = min(_LAST_MULTIPLE / num_keys, 1.0)
    return float((_FIRST_MULTIPLE / num_keys) ** (1 - risen) * last**risen)


class RisingThreshold:
    """Sets the threshold of every sparse core of a model before each of its training forwards.

    A hook on the core sees how many keys there are, so images of any size get their own T n, and nothing has to be
    stored to resume. Use as a context manager; the hooks go when it ends.

    Raises InputError if the model has no sparse core beside a Taylor part: there is nothing that could rise.
    """

    def __init__(self, model: nn.Module) -> None:
        self.progress = 0.0
        self._cores = [m for m in model.modules() if isinstance(m, TaylorSparse) and m.low_rank]
        if not self._cores:
            raise InputError("threshold_schedule='rising' needs a model converted with a 'taylor_sparse' core")
        self._handles: list[Any] = []

    def __enter__(self) -> RisingThreshold:
        self._handles = [core.register_forward_pre_hook(self._set, with_kwargs=True) for core in self._cores]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _set(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(core, TaylorSparse)
        if core.training:
            key = args[1] if len(args) > 1 else kwargs["key"]
            core.set_threshold(rising_threshold(self.progress, key.shape[-2]))
