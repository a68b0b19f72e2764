"""Target descriptions: YAML files that say what a machine reaches, every figure with its unit, source and status.

>>> h100 = load("h100")
>>> h100.si("peak.bf16"), h100["launch.eager"].value, h100["launch.eager"].unit, h100["launch.eager"].status
(989400000000000.0, 5.0, 'us', 'assumed')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

from vitrify.convert.recipe import read_yaml
from vitrify.cost.fusion import Fusion
from vitrify.cost.table_schema import Form, check
from vitrify.cost.tables import Entry
from vitrify.errors import InputError, unknown

FOLDER = Path(__file__).parent / "targets"

DTYPES: Mapping[str, int] = {"fp32": 32, "tf32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8}
"""Formats that products are made in, and the width in which their operands are stored."""

FLOATS = ("fp32", "tf32", "bf16", "fp16")
PRODUCTS = ("matmul", "attention", "batched", "convolution", "depthwise", "shift", "shift8")
"""Kinds of product, each of which reaches its own part of the peak; see LATENCY.md."""

_SCALE = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "u": 1e-6, "m": 1e-3, "": 1.0}
_RATE, _BYTES = r"[GT](FLOP|OP)/s", r"[GT]B/s"
FORM = Form(
    what="target",
    header=("title", "extends", "machine", "dtype", "fusion"),
    sections={
        "peak": ((tuple(DTYPES),), _RATE, "TFLOP/s, GFLOP/s, TOP/s or GOP/s"),
        "vector": ((("arithmetic", "special"),), _RATE, "TOP/s, GOP/s, TFLOP/s or GFLOP/s"),
        "decode": ((("shift", "round"),), _RATE, "GOP/s (weights decoded, or activations rounded, a second)"),
        "bandwidth": ((("memory", "cache"),), _BYTES, "TB/s or GB/s"),
        "launch": ((("eager", "compiled"),), r"[um]?s", "us, ms or s"),
        "memory": ((("size", "cache"),), r"[kMGT]B", "GB, MB or kB"),
        "units": ((("processors", "threads"),), r"count", "count"),
        "efficiency": (((*PRODUCTS, "vector", "memory", "cache", "launch"),), r"ratio", "ratio"),
        "error": ((("time", "saving"),), r"ratio", "ratio"),
    },
    required=("value", "unit", "source", "status"),
    statuses={"published": False, "measured": False, "fitted": True, "derived": True, "assumed": True},
)
# What may be left out, and what its absence means: caches as fast as memory, codes decoded and
# activations rounded at no cost, one processor.
_OPTIONAL = ("bandwidth.cache", "memory.cache", "decode.shift", "decode.round", "units.processors", "units.threads")


@dataclass(frozen=True)
class Target:
    """A machine that a model might run on.

    name      of a target that ships with vitrify, or the path of the user's
    title     what it is, in words
    machine   the name that `vitrify bench` gives its results there; "" if there are none
    dtype, fusion   the format that a model runs in there unless told otherwise, and whether "compiled" or "eager"
    entries   its figures by key: "peak.bf16", "bandwidth.memory", "launch.eager", "efficiency.matmul", ...
    """

    name: str
    title: str
    machine: str
    dtype: str
    fusion: Fusion
    entries: Mapping[str, Entry]

    def __getitem__(self, key: str) -> Entry:
        if key not in self.entries:
            section, _, name = key.partition(".")
            known = [entry.partition(".")[2] for entry in self.entries if entry.startswith(f"{section}.")]
            raise InputError(f"target {self.name!r} has no {section} for {name}: it has {', '.join(known) or 'none'}")
        return self.entries[key]

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def si(self, key: str) -> float:
        """Return a figure in operations, bytes or seconds, or per second; InputError if the target has none."""
        entry = self[key]
        unit = entry.unit.partition("/")[0]
        prefix = unit.removesuffix("FLOP").removesuffix("OP").removesuffix("B").removesuffix("s")
        return entry.value * _SCALE.get(prefix, 1.0)

    def get(self, key: str, default: float) -> float:
        """Return `si(key)`, or `default` where the target leaves it out."""
        return self.si(key) if key in self.entries else default


def names() -> list[str]:
    """Return the names of the targets that ship with vitrify."""
    return sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))


def load(target: str | Path) -> Target:
    """Return a target by its name (`names()`), or by the path of a YAML or JSON file of the same form.

    A file may say `extends: NAME_OR_PATH` and then name only what differs. Raises InputError naming file and key for
    an unknown target or key, and for figures that are missing, negative, zero, no numbers, or in another unit.
    """
    found = _load(str(target), ())
    if missing := [key for key in _needed() if key not in found.entries]:
        raise InputError(
            f"target {found.name!r} lacks {', '.join(missing)}: a file that says `extends: cpu` (or another of "
            f"{', '.join(names())}) has the others"
        )
    if found.dtype not in FLOATS or f"peak.{found.dtype}" not in found.entries:
        raise InputError(f"target {found.name!r}: dtype must be a float that it has a peak for, not {found.dtype!r}")
    if found.fusion not in get_args(Fusion):
        raise InputError(f"target {found.name!r}: fusion must be one of {get_args(Fusion)}, not {found.fusion!r}")
    return found


def _needed() -> list[str]:
    keys = [f"{section}.{name}" for section, ((listed,), _, _) in FORM.sections.items() for name in listed or ()]
    return [key for key in keys if key not in _OPTIONAL and not key.startswith("peak.")]


@cache
def _load_shipped(name: str) -> Target:
    return _read(FOLDER / f"{name}.yaml", name, (name,))


def _load(target: str, extending: tuple[str, ...]) -> Target:
    if target in extending:
        raise InputError(f"targets extend each other in a circle: {' -> '.join([*extending, target])}")
    if Path(target).suffix in (".yaml", ".yml", ".json"):
        return _read(Path(target), target, (*extending, target))
    if target not in [path.stem for path in FOLDER.glob("*.yaml")]:
        raise InputError(f"{unknown('target', target, names())}. A path ends in .yaml, .yml or .json")
    return _load_shipped(target)


def _read(path: Path, name: str, extending: tuple[str, ...]) -> Target:
    data = read_yaml(path, "target")
    own = {key: _entry(fields, key, name) for key, fields in check(data, name, FORM)}
    base = _load(data["extends"], extending) if "extends" in data else Target("", "", "", "", "eager", {})
    return Target(
        name=name,
        title=data.get("title", base.title or name),
        # Another machine's benchmarks are not this one's.
        machine=data.get("machine", ""),
        dtype=data.get("dtype", base.dtype),
        fusion=data.get("fusion", base.fusion),
        entries={**base.entries, **own},
    )


def _entry(fields: Mapping[str, object], key: str, name: str) -> Entry:
    value = float(fields["value"])  # type: ignore[arg-type]  # checked
    if value == 0 and not key.startswith(("launch.", "error.")):
        raise InputError(f"target {name!r}: {key}.value must be more than 0")
    kept = {field: fields[field] for field in ("unit", "source", "status", "how", "range")}
    return Entry(value=value, node_nm=None, **kept)  # type: ignore[arg-type]
