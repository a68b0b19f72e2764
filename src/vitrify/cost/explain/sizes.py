"""From which image size on Taylor attention pays: the model traced at other sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from vitrify.cost.explain.groups import Layout
from vitrify.cost.explain.variants import InputSize, meta_copy, variant
from vitrify.cost.graph import Workload
from vitrify.cost.workload import workload
from vitrify.errors import InputError

LARGEST = 2048
"""Pixels: no break-even is looked for beyond."""

Seconds = Callable[[Workload], float]


@dataclass(frozen=True)
class Sizes:
    """What Taylor attention saves at other image sizes.

    break_even   the least side, in pixels, from which on it saves time; None if there is none up to `LARGEST`
    savings      by side: part of the whole model's time that it saves; negative where it is slower
    """

    break_even: int | None
    savings: Mapping[int, float]


def sizes(
    model: nn.Module, layout: Layout, input_size: InputSize, batch_size: int, seconds: Seconds, own: float
) -> Sizes | None:
    """Find the break-even by bisection over the sides that the model takes; None if it takes only its own.

    seconds: the time of the whole model, by the workload of the part of it that is given. own: what Taylor attention
    saves at `input_size`. As bisection does, it assumes that the saving grows with the side.
    """
    step = _step(model)
    channels, height, width = input_size
    found = {height: own} if height == width and height % step == 0 else {}

    def saving(side: int) -> float:
        if side not in found:
            found[side] = _saving(model, layout, (channels, side, side), batch_size, seconds)
        return found[side]

    try:
        low, high = step, LARGEST // step * step
        _ = saving(high), saving(max(round(1024 / step), 1) * step)
        low = _least(saving, step, high)
    except InputError:  # it takes only the size that it was built for
        return None
    if saving(high) <= 0:
        return Sizes(None, found)
    high = min(side for side, saved in found.items() if saved > 0)
    low = max((side for side in found if low < side < high), default=low)
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (low, middle) if saving(middle) > 0 else (middle, high)
    return Sizes(high, dict(sorted(found.items())))


def _least(saving: Callable[[int], float], step: int, high: int) -> int:
    """Return the least side that the model takes, of those that double from `step` on."""
    side = step
    while side < high:
        try:
            saving(side)
        except InputError:
            side *= 2
        else:
            return side
    return high


def _saving(model: nn.Module, layout: Layout, size: InputSize, batch_size: int, seconds: Seconds) -> float:
    sized = resized(model, size)
    converted = variant(sized, layout, {"attention core": "taylor"}, size, batch_size)
    if converted is None:  # with so few tokens recipes leave all attention as it is
        return 0.0
    return 1 - seconds(converted.workload) / seconds(workload(sized, size, batch_size))


def resized(model: nn.Module, size: InputSize) -> nn.Module:
    """Return a copy without weights that takes images of another size, where the model knows how; else as it is."""
    copied = meta_copy(model)
    change = getattr(copied, "set_input_size", None)
    if callable(change):
        try:
            change(img_size=size[1:])
        except Exception as error:  # any model may be given, and may fail in any way
            raise InputError(f"{type(model).__name__} does not take images of {size[1]} px: {error}") from error
    return copied


def _step(model: nn.Module) -> int:
    """Return the side of a patch; 32 pixels, which all pyramids take, where the model does not say."""
    side = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    side = max(side) if isinstance(side, tuple) else side
    return side if isinstance(side, int) and callable(getattr(model, "set_input_size", None)) else 32
