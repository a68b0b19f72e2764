"""What a conversion did: every module that the recipe speaks of, as changed, kept or refused, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vitrify.convert.recipe import Recipe
from vitrify.convert.specs import Spec


@dataclass(frozen=True)
class Change:
    """One module: its qualified name, its class before the conversion, and what became of it or why nothing did."""

    name: str
    module_class: str
    detail: str


@dataclass
class Conversion:
    """The result of `convert_`; also on the model, as `model._vitrify`.

    recipe      the recipe as given
    changed     modules that now compute what the recipe says
    kept        modules left as they were although they could be converted: filtered out, costlier otherwise, or without
                anything that the recipe replaces
    refused     modules that cannot be converted exactly, with the reason
    notes       what else a reader should know, such as costs that could not be checked
    input_size  (channels, height, width) at which costs were compared; None if they were not
    applied     what each converted module now is, by qualified name; those of earlier conversions that stand included
    """

    recipe: Recipe
    changed: list[Change] = field(default_factory=list)
    kept: list[Change] = field(default_factory=list)
    refused: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    input_size: tuple[int, int, int] | None = None
    applied: dict[str, Spec] = field(default_factory=dict)

    @property
    def resolved(self) -> Recipe:
        """The recipe module by module: it repeats what the model now is, whatever the filters and input sizes were."""
        return Recipe(self.recipe.name, modules=self.applied, keep_if_costlier=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        counts = f"{len(self.changed)} changed, {len(self.kept)} kept, {len(self.refused)} refused"
        lines = [f"recipe {self.recipe.name!r}: {counts}"]
        groups = (("changed", self.changed), ("kept", self.kept), ("refused", self.refused))
        rows = [(status, c.name or "(the model)", c.module_class, c.detail) for status, group in groups for c in group]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*cells, row[3]]))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
