"""The space of an exploration: places of a hardware description, and the values that each may take.

>>> from vitrify.accelerator.hardware import load
>>> space = read({"sram_kib": {"low": 100, "high": 400, "factor": 2}, "schedule": ["vitality"]}, load("vitality"))
>>> space.axes["sram_kib"], space.size, space.changes((2, 0))
((100, 200, 400), 3, {'sram_kib': 400, 'schedule': 'vitality'})
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrify.accelerator.hardware import Hardware, describe
from vitrify.accelerator.prices import Prices
from vitrify.accelerator.schedules import SCHEDULES
from vitrify.convert.recipe import read_yaml
from vitrify.errors import InputError, unknown

Value = Any
"""A number, a word, true or false, or a list of words: whatever the place holds."""
Point = tuple[int, ...]
"""The number of a value on each axis."""
Design = Mapping[str, Value]
"""The value on each axis."""

_MOST_VALUES = 1_000
_RANGE = "low, high and step (low, low + step, ...) or factor (low, low * factor, ...)"


@dataclass(frozen=True)
class Space:
    """Axes by name. A name is a place of the hardware, or several with commas between, which move together."""

    axes: Mapping[str, tuple[Value, ...]]

    @property
    def size(self) -> int:
        """How many designs there are."""
        return math.prod(map(len, self.axes.values()))

    def point(self, index: int) -> Point:
        """Return the point of that number, 0 to size - 1; the last axis moves fastest."""
        found = []
        for values in reversed(list(self.axes.values())):
            index, digit = divmod(index, len(values))
            found.append(digit)
        return tuple(reversed(found))

    def design(self, point: Point) -> dict[str, Value]:
        """Return the values of a point, by axis."""
        return {axis: values[digit] for (axis, values), digit in zip(self.axes.items(), point, strict=True)}

    def changes(self, point: Point) -> dict[str, Value]:
        """Return the values of a point, by place: what `Hardware.with_` takes."""
        return {place: value for axis, value in self.design(point).items() for place in places(axis)}

    def design_of(self, hardware: Hardware) -> dict[str, Value]:
        """Return what a hardware has where the axes are; "64 / 1" where the places of one axis differ."""
        found = {}
        for axis in self.axes:
            values = [_at(hardware, place) for place in places(axis)]
            same = all(value == values[0] for value in values)
            found[axis] = values[0] if same else " / ".join(map(show, values))
        return found


def places(axis: str) -> list[str]:
    """Return the places that an axis moves."""
    return [place.strip() for place in axis.split(",")]


def show(value: Value) -> str:
    """Write a value for a person."""
    if isinstance(value, list | tuple):
        return "+".join(map(show, value))
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def key(design: Design) -> str:
    """Return text that is the same for the same design, whatever the order of its axes."""
    return json.dumps(design, sort_keys=True)


def read(space: str | Path | Mapping[str, Any] | Space, hardware: Hardware) -> Space:
    """Return the space that a YAML or JSON file, or its plain data, describes; one that was read before as it is.

    space    {place: values}, values being a list, or a range {low, high, step} or {low, high, factor}, both ends
             included; a place may be several with commas between, which take the same value

    Raises InputError for a place that the hardware does not have, a value that does not fit there, an empty list or
    range, and a place or value that is there twice.
    """
    if isinstance(space, Space):
        return space
    where = "the space" if isinstance(space, Mapping) else f"space {str(space)!r}"
    data = space if isinstance(space, Mapping) else read_yaml(Path(space), "space")
    if not isinstance(data, Mapping) or not data or not all(isinstance(axis, str) for axis in data):
        raise InputError(f"{where} must map places of the hardware to lists or ranges of values, not {data!r:.60}")
    axes = {axis: _values(entry, f"{where}: {axis}") for axis, entry in data.items()}
    seen: set[str] = set()
    for axis, values in axes.items():
        for place in places(axis):
            if place in seen:
                raise InputError(f"{where}: {place} is there twice")
            seen.add(place)
            for value in values:
                _check(place, value, hardware, where)
    return Space(axes)


def _values(entry: Any, where: str) -> tuple[Value, ...]:
    values = _range(entry, where) if isinstance(entry, Mapping) else entry
    if not isinstance(values, list):
        raise InputError(f"{where} must be a list of values, or a range with {_RANGE}, not {entry!r:.60}")
    if not values:
        raise InputError(f"{where} is empty: give at least one value")
    texts = [json.dumps(value) for value in values]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise InputError(f"{where} has {twice} twice")
    return tuple(values)


def _range(entry: Mapping[Any, Any], where: str) -> list[Value]:
    if set(entry) not in ({"low", "high", "step"}, {"low", "high", "factor"}):
        raise InputError(f"{where}: a range has {_RANGE}, not {', '.join(map(str, entry)) or 'nothing'}")
    for name, number in entry.items():
        if not isinstance(number, int | float) or isinstance(number, bool) or not math.isfinite(number):
            raise InputError(f"{where}: {name} must be a number, not {number!r}")
    low, high, grows = entry["low"], entry["high"], "factor" in entry
    by = entry["factor"] if grows else entry["step"]
    if low > high:
        raise InputError(f"{where}: the range from {low:g} to {high:g} is empty")
    if not grows and by <= 0:
        raise InputError(f"{where}: step must be above 0, not {by:g}")
    if grows and (by <= 1 or low <= 0):
        raise InputError(f"{where}: factor must be above 1 and low above 0, not {by:g} and {low:g}")
    # A ten-billionth more: 0.1 + 2 * 0.1 is above 0.3.
    count = int((math.log(high / low, by) if grows else (high - low) / by) + 1e-10) + 1
    if count > _MOST_VALUES:
        raise InputError(f"{where}: the range has {count:,} values; {_MOST_VALUES:,} at most")
    return [_plain(low * by**i if grows else low + i * by) for i in range(count)]


def _plain(number: float) -> int | float:
    if isinstance(number, int):
        return number
    rounded = float(f"{number:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def _check(place: str, value: Value, hardware: Hardware, where: str) -> None:
    """Raise InputError unless the hardware with this value can be priced and placed upon."""
    if place.partition(".")[0] in ("title", "standing"):
        raise InputError(f"{where}: {place} says something about the hardware, and changes nothing of it")
    try:
        changed = hardware.with_({place: value})
        if changed.schedule not in SCHEDULES:
            raise unknown("schedule", str(changed.schedule), SCHEDULES)
        _ = Prices(changed).levels
    except InputError as error:
        raise InputError(f"{where}: {place}: {show(value)}: {error}") from None


def _at(hardware: Hardware, place: str) -> Value:
    section: Any = describe(hardware)
    for part in place.split("."):
        section = section[part]
    return section


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Sequence[str]:
    """Return "place: old value, now new value" for everything in which two pieces of plain data differ."""
    found: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {_short(before)}, now {_short(after)}")
    return found


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
