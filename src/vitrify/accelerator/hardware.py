"""Hardware descriptions: engines, memories, clock and widths, read from YAML and checked. See README.md.

>>> vitality = load("vitality")
>>> vitality.engines["general"].pes, vitality.numbers.activation_bits, vitality.standing_of("clock_mhz")
(4096, 8, 'recalled')
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vitrify.convert.recipe import read_yaml
from vitrify.cost.graph import Primitive, VectorKind
from vitrify.cost.schema_check import check_schema
from vitrify.errors import InputError, unknown

PRESETS = Path(__file__).parent / "presets"
SCHEMA = Path(__file__).parent / "hardware.schema.json"

Dataflow = Literal["output", "weight", "input"]
DATAFLOWS: tuple[Dataflow, ...] = get_args(Dataflow)
Standing = Literal["published", "recalled", "derived", "assumed"]
STANDINGS: tuple[Standing, ...] = get_args(Standing)


@dataclass(frozen=True)
class Numbers:
    """Widths in bits. Operands narrower than these keep their own; wider ones are rounded to them.

    vector_bits   in which the vector engines compute
    """

    activation_bits: int = 8
    weight_bits: int = 8
    partial_bits: int = 24
    vector_bits: int = 16


@dataclass(frozen=True)
class Systolic:
    """An array of rows x columns PEs, each of which multiplies (shifts, adds) and accumulates once a cycle.

    primitives    what its PEs can do; more than one makes them reconfigurable
    left_bits, right_bits   widths of the operands: activations (or codes), and weights (or values)
    dataflows     which operand may stay in the PEs: the output, the weight (right operand) or the input (left operand)
    in_place      PEs have a second accumulation mode: what they accumulated can be the next product's right operand
    port_bits     what the array can read from the SRAM in a cycle, and as much again write
    """

    rows: int
    columns: int
    primitives: tuple[Primitive, ...] = ("multiply",)
    left_bits: int = 8
    right_bits: int = 8
    dataflows: tuple[Dataflow, ...] = DATAFLOWS
    in_place: bool = False
    port_bits: int = 4096

    @property
    def pes(self) -> int:
        """The number of PEs."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Lanes:
    """Lanes of scalar units: each lane has one for every kind that it does, and these work side by side.

    A unit starts an operation every `interval` cycles and has its result `latency` cycles later.
    """

    lanes: int
    does: tuple[VectorKind, ...]
    latency: int = 1
    interval: int = 1
    port_bits: int = 4096


Engine = Systolic | Lanes


@dataclass(frozen=True)
class Dram:
    """Bandwidth in 1e9 bytes a second, latency in ns, and the entry of the table `dram` that prices a bit."""

    gb_per_s: float
    latency_ns: float
    energy: str


@dataclass(frozen=True)
class Hardware:
    """A modelled accelerator.

    schedule    the function of `schedules` that maps a workload onto it
    engines     by name, in the order in which they are preferred
    sram_kib    one on-chip buffer for weights, activations and partial sums
    standing    what is known of each figure: "published", "recalled", "derived" or "assumed", by its place
    """

    name: str
    title: str
    clock_mhz: float
    node_nm: float
    schedule: str
    numbers: Numbers
    engines: Mapping[str, Engine]
    sram_kib: float
    dram: Dram
    standing: Mapping[str, Standing] = field(default_factory=dict)

    @property
    def arrays(self) -> dict[str, Systolic]:
        """The systolic arrays among the engines."""
        return {name: engine for name, engine in self.engines.items() if isinstance(engine, Systolic)}

    @property
    def dram_bits_per_cycle(self) -> float:
        """What the DRAM delivers in one of the accelerator's cycles."""
        return self.dram.gb_per_s * 8e3 / self.clock_mhz

    def standing_of(self, place: str) -> Standing:
        """Return what is known of a figure, "engines.general.rows" say: its own entry, or its section's."""
        parts = place.split(".")
        for end in range(len(parts), 0, -1):
            if (found := self.standing.get(".".join(parts[:end]))) is not None:
                return found
        raise InputError(f"hardware {self.name!r} does not say where {place} comes from: add it under `standing`")

    def with_(self, changes: Mapping[str, Any], name: str | None = None) -> Hardware:
        """Return it with figures replaced, {"engines.general.rows": 32, "sram_kib": 128}, which stand as assumed.

        Raises InputError for a place that it does not have or a value that does not fit.
        """
        data = describe(self)
        for place, value in changes.items():
            *path, last = place.split(".")
            section: Any = data
            for part in path:
                section = section.get(part) if isinstance(section, dict) else None
            if not isinstance(section, dict) or last not in section:
                raise unknown(f"place in hardware {self.name!r}", place, _places(data))
            section[last] = list(value) if isinstance(value, tuple) else value
        changed = parse(data, name or self.name)
        figures = _places(data)
        assumed: dict[str, Standing] = {place: "assumed" for place in changes if place in figures}
        return replace(changed, standing={**self.standing, **assumed})


def names() -> list[str]:
    """Return the presets that ship with vitrify."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(hardware: str | Path | Hardware) -> Hardware:
    """Return a preset by name, or a description of the user's own by path (.yaml, .yml, .json).

    Raises InputError for an unknown name, a file that is missing or does not fit the schema, by the place.
    """
    if isinstance(hardware, Hardware):
        return hardware
    if Path(hardware).suffix in (".yaml", ".yml", ".json"):
        return parse(read_yaml(Path(hardware), "hardware"), str(hardware))
    if hardware not in names():
        raise InputError(f"{unknown('hardware', str(hardware), names())}. A path ends in .yaml, .yml or .json")
    return parse(read_yaml(PRESETS / f"{hardware}.yaml", "hardware"), str(hardware))


def parse(data: Mapping[str, Any], name: str) -> Hardware:
    """Return the description that plain data holds; raises InputError naming the place that is wrong."""
    check_schema(data, _schema(), _schema(), f"hardware {name!r}")
    engines: dict[str, Engine] = {}
    for engine, entries in data["engines"].items():
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entries.items()}
        kind = fields.pop("kind")
        try:
            engines[engine] = Systolic(**fields) if kind == "systolic" else Lanes(**fields)
        except TypeError as error:
            raise InputError(f"hardware {name!r}.engines.{engine}, of kind {kind}: {error}") from None
    standing: dict[str, Standing] = {}
    for kind, places in data["standing"].items():
        for place in places:
            standing[place] = kind
    made = Hardware(
        name,
        data["title"],
        data["clock_mhz"],
        data["node_nm"],
        data["schedule"],
        Numbers(**data["numbers"]),
        engines,
        data["sram_kib"],
        Dram(**data["dram"]),
        standing,
    )
    known = _places(describe(made))
    for place in standing:
        if not any(place == full or full.startswith(f"{place}.") for full in known):
            raise unknown(f"place under standing of hardware {name!r}", place, known)
    for place in known:
        made.standing_of(place)
    return made


def describe(hardware: Hardware) -> dict[str, Any]:
    """Return the plain data that `parse` reads."""
    engines: dict[str, dict[str, Any]] = {}
    for name, engine in hardware.engines.items():
        kind = "systolic" if isinstance(engine, Systolic) else "lanes"
        engines[name] = {
            "kind": kind,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in vars(engine).items()},
        }
    standing: dict[str, list[str]] = {}
    for place, kind in hardware.standing.items():
        standing.setdefault(kind, []).append(place)
    return {
        "title": hardware.title,
        "clock_mhz": hardware.clock_mhz,
        "node_nm": hardware.node_nm,
        "schedule": hardware.schedule,
        "numbers": dict(vars(hardware.numbers)),
        "engines": engines,
        "sram_kib": hardware.sram_kib,
        "dram": dict(vars(hardware.dram)),
        "standing": standing,
    }


def _places(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the figures' places: the words (title, schedule, kinds and lists of names) are no figures."""
    found: list[str] = []
    for key, value in data.items():
        if isinstance(value, dict) and key != "standing":
            found += _places(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(f"{prefix}{key}")
    return found


@cache
def _schema() -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(SCHEMA.read_text()))
