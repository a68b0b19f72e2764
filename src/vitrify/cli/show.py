"""How a Conversion is shown on a terminal or in a log."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrify.convert import Change, Conversion

_LOG_WIDTH = 160
_NUMBER = re.compile(r"\d+")
_ERROR = "; weight error "


def print_conversion(conversion: Conversion, *, stderr: bool = False) -> None:
    """Print one row per module; those that differ in numbers and errors alone share one: blocks.0-11.attn."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    counts = ", ".join(f"{len(getattr(conversion, group))} {group}" for group in ("changed", "kept", "refused"))
    table = Table(title=f"recipe {conversion.recipe.name}: {counts}", title_justify="left", show_edge=False)
    for header in ("", "module", "class", "what it is now, or why it stays"):
        table.add_column(header, overflow="fold")
    for status, colour in (("changed", "green"), ("kept", "yellow"), ("refused", "red")):
        for (_, module_class, detail), group in _groups(getattr(conversion, status)).items():
            names = _span([change.name for change in group])
            shown = detail + _errors(group)
            table.add_row(f"[{colour}]{status}[/]", escape(names), escape(module_class), escape(shown))
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    console.print(table)
    for note in conversion.notes:
        console.print(f"note: {note}", markup=False)


def _groups(changes: list[Change]) -> dict[tuple[str, str, str], list[Change]]:
    """Return the changes by what they share, in the order of the first of each: name but for numbers, class, detail."""
    groups: dict[tuple[str, str, str], list[Change]] = {}
    for change in changes:
        key = _pattern(change.name), change.module_class, change.detail.partition(_ERROR)[0]
        groups.setdefault(key, []).append(change)
    return groups


def _errors(group: list[Change]) -> str:
    """Return the range of the weight errors at the end of the details, or nothing."""
    values = sorted({error.removesuffix(" %") for c in group if (error := c.detail.partition(_ERROR)[2])}, key=float)
    return f"{_ERROR}{' to '.join(dict.fromkeys((values[0], values[-1])))} %" if values else ""


def _pattern(name: str) -> str:
    return _NUMBER.sub("#", name)


def _span(names: list[str]) -> str:
    """Write names that count through every combination of some ranges of numbers as one, others one by one.

    >>> _span(["blocks.0.attn", "blocks.1.attn"])
    'blocks.0-1.attn'
    >>> _span(["stages.0.1.attn", "stages.1.0.attn"])
    'stages.0.1.attn, stages.1.0.attn'
    """
    columns = [sorted({int(n) for n in column}) for column in zip(*map(_NUMBER.findall, names), strict=True)]
    consecutive = all(column[-1] - column[0] == len(column) - 1 for column in columns)
    if not consecutive or math.prod(map(len, columns)) != len(names):
        return ", ".join(names)
    ranges = iter(["-".join(dict.fromkeys((str(c[0]), str(c[-1])))) for c in columns])
    return _NUMBER.sub(lambda _: next(ranges), names[0])
