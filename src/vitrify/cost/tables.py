"""Unit-cost tables: YAML files in which every figure carries its unit, node, source, and whether it was published.

>>> table = load("horowitz45")
>>> table["energy.multiply.int8"].value, table["energy.multiply.fp8"].status
(0.2, 'derived')
>>> table.at_width("energy", "shift", 12).how
'between int8 and int16: a power law in the width'
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from vitrify.convert.recipe import read_yaml
from vitrify.cost.table_schema import check
from vitrify.errors import InputError, unknown

FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Entry:
    """One figure of a table.

    value     in `unit`: "pJ", "um2", "pJ/16bit" (for so many bits moved), "MAC/16bit" (relative), "ratio"
    node_nm   the process that it holds for; None if its source does not say
    source    the citation
    status    "published"; "derived" or "measured", and then `how` says from what; targets have "fitted", "assumed" too
    range     the least and the greatest value met, where sources disagree
    """

    value: float
    unit: str
    node_nm: float | None
    source: str
    status: Literal["published", "derived", "measured", "fitted", "assumed"]
    how: str = ""
    range: tuple[float, float] | None = None

    @property
    def pj_per_bit(self) -> float:
        """The price of moving one bit; raises InputError for a figure that is no such price."""
        match = re.fullmatch(r"pJ/(\d*)bit", self.unit)
        if not match:
            raise InputError(f"{self.value:g} {self.unit} is no price in pJ for moving bits ({self.source})")
        return self.value / int(match[1] or 1)


@dataclass(frozen=True)
class Table:
    """Figures by their dotted key: "energy.multiply.fp32", "area.add.int8", "access.sram", "dram.hbm2".

    name    of a table that ships with vitrify, or the path of the user's
    """

    name: str
    title: str
    entries: Mapping[str, Entry]

    def __getitem__(self, key: str) -> Entry:
        if key not in self.entries:
            section = key.partition(".")[0]
            error = unknown("key", key, [known for known in self.entries if known.startswith(f"{section}.")])
            hint = (
                ". A table that says `extends: horowitz45` has the others, too" if section in ("energy", "area") else ""
            )
            raise InputError(f"unit-cost table {self.name!r}: {error}{hint}")
        return self.entries[key]

    def at_width(self, section: str, operation: str, bits: float) -> Entry:
        """Return the figure of an integer operation of any width: the entry, or a power law through its neighbours.

        Widths beyond the table's continue its nearest two. Raises InputError if the table has neither this width nor
        two others.
        """
        prefix = f"{section}.{operation}.int"
        known = sorted(int(key.removeprefix(prefix)) for key in self.entries if key.startswith(prefix))
        if bits in known or len(known) < 2:
            return self[f"{prefix}{bits:g}"]
        upper = next((i for i, width in enumerate(known) if width > bits), len(known) - 1)
        low, high = known[max(upper, 1) - 1], known[max(upper, 1)]
        start, end = self[f"{prefix}{low}"], self[f"{prefix}{high}"]
        if min(start.value, end.value) > 0:
            value = start.value * (bits / low) ** (math.log(end.value / start.value) / math.log(high / low))
            law = "a power law in the width"
        else:  # a table may give an operation away; no power law passes through 0
            value = max(start.value + (end.value - start.value) * (bits - low) / (high - low), 0.0)
            law = "a straight line in the width"
        where = "between" if low < bits < high else "beyond"
        how = f"{where} int{low} and int{high}: {law}"
        return replace(start, value=value, status="derived", how=how, range=None)


def names() -> list[str]:
    """Return the names of the tables that ship with vitrify."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(table: str | Path) -> Table:
    """Return a table by its name (`names()`), or by the path of a YAML or JSON file of the same form.

    A file may say `extends: NAME_OR_PATH` and then name only what differs. Raises InputError naming file and key for
    keys that are unknown, and for values that are missing, negative, no numbers, or in another unit.
    """
    return _load(str(table), ())


@cache
def _load_shipped(name: str) -> Table:
    return _read(FOLDER / f"{name}.yaml", name, (name,))


def _load(table: str, extending: tuple[str, ...]) -> Table:
    if table in extending:
        raise InputError(f"unit-cost tables extend each other in a circle: {' -> '.join([*extending, table])}")
    if Path(table).suffix in (".yaml", ".yml", ".json"):
        return _read(Path(table), table, (*extending, table))
    if table not in names():
        raise InputError(f"{unknown('unit-cost table', table, names())}. A path ends in .yaml, .yml or .json")
    return _load_shipped(table)


def _read(path: Path, name: str, extending: tuple[str, ...]) -> Table:
    data = read_yaml(path, "unit-cost table")
    own = {
        key: Entry(
            float(fields["value"]),
            fields["unit"],
            fields["node"],
            fields["source"],
            fields["status"],
            fields["how"],
            fields["range"],
        )
        for key, fields in check(data, name)
    }
    base = _load(data["extends"], extending).entries if "extends" in data else {}
    return Table(name, data.get("title", name), {**base, **own})


def scale(from_nm: float, to_nm: float, quantity: Literal["energy", "area"]) -> Entry:
    """Return what a figure at one node is multiplied by at another: published to 28 nm, elsewhere a ratio of two such.

    Stillmaker and Baas, Integration 2017. Raises InputError for a node that the rules do not have.
    """
    table = load("scaling")
    unity = Entry(1.0, "ratio", 28, "", "published")
    start, end = (unity if nm == 28 else table[f"scaling.{quantity}.{nm:g}"] for nm in (from_nm, to_nm))
    if end is unity:
        return start
    how = f"the factor from {from_nm:g} nm to 28 nm over the factor from {to_nm:g} nm"
    return Entry(start.value / end.value, "ratio", to_nm, end.source, "derived", how)
