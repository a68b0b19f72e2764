"""How a Conversion is shown on a terminal or in a log."""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrify.convert import Change, Conversion

_LOG_WIDTH = 160
_NUMBER = re.compile(r"\d+")


def print_conversion(conversion: Conversion, *, stderr: bool = False) -> None:
    """Print one row per module; equal neighbours that differ in one block number share a row: blocks.0-11.attn."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    counts = ", ".join(f"{len(getattr(conversion, group))} {group}" for group in ("changed", "kept", "refused"))
    table = Table(title=f"recipe {conversion.recipe.name}: {counts}", title_justify="left", show_edge=False)
    for header in ("", "module", "class", "what it is now, or why it stays"):
        table.add_column(header, overflow="fold")
    for status, colour in (("changed", "green"), ("kept", "yellow"), ("refused", "red")):
        changes: list[Change] = getattr(conversion, status)
        for (_, module_class, detail), group in groupby(
            changes, lambda c: (_pattern(c.name), c.module_class, c.detail)
        ):
            names = _span([change.name for change in group])
            table.add_row(f"[{colour}]{status}[/]", escape(names), escape(module_class), escape(detail))
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    console.print(table)
    for note in conversion.notes:
        console.print(f"note: {note}", markup=False)


def _pattern(name: str) -> str:
    return _NUMBER.sub("#", name)


def _span(names: list[str]) -> str:
    """Write names that count up in one number as a range, others one by one.

    >>> _span(["blocks.0.attn", "blocks.1.attn"])
    'blocks.0-1.attn'
    >>> _span(["stages.0.1.attn", "stages.1.0.attn"])
    'stages.0.1.attn, stages.1.0.attn'
    """
    numbers = [_NUMBER.findall(name) for name in names]
    varying = [i for i, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    counted = [int(row[varying[0]]) for row in numbers] if len(varying) == 1 else []
    if not counted or counted != list(range(counted[0], counted[0] + len(counted))):
        return ", ".join(names)
    start, end = (_positions(name)[varying[0]] for name in (names[0], names[-1]))
    first, last = names[0], names[-1]
    return f"{first[: start.end()]}-{last[end.start() : end.end()]}{first[start.end() :]}"


def _positions(name: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(name))
