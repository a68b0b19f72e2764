"""What a unit-cost file may say: its sections, names, units and fields, and the errors that name file and key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vitrify.errors import InputError, unknown

FORMATS = ("fp32", "fp16", "bf16", "fp8", "int32", "int16", "int8", "int4")
OPERATIONS = ("multiply", "add", "shift", "exp", "div", "sqrt", "erf", "tanh", "compare")
LEVELS = ("dram", "sram", "noc", "noc_psum", "register", "register_weight", "sram_8kb", "sram_32kb", "sram_1mb")

# Section -> the names allowed at each level below it (None: any), the pattern of its units, and those units in words.
_SECTIONS: dict[str, tuple[tuple[tuple[str, ...] | None, ...], str, str]] = {
    "energy": ((OPERATIONS, FORMATS), r"pJ", "pJ"),
    "area": (((*OPERATIONS, "register"), (*FORMATS, "bit")), r"um2", "um2"),
    "access": ((LEVELS,), r"(pJ|MAC)/([1-9]\d*)?bit", "pJ/bit, pJ/16bit, MAC/16bit or the like"),
    "dram": ((None,), r"pJ/([1-9]\d*)?bit", "pJ/bit, pJ/64bit or the like"),
    "scaling": ((("energy", "area"), None), r"ratio", "ratio"),
}
_HEADER = ("title", "extends", "sources", "methods")
_REQUIRED = ("value", "unit", "node", "source", "status")
_FIELDS = (*_REQUIRED, "how", "range")


def check(data: Any, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted key, fields) of each entry, with `source` and `how` replaced by the text that they name.

    Raises InputError naming `file` and the key for anything that the form of a unit-cost file does not allow.
    """
    _check_keys(data, [*_HEADER, *_SECTIONS], file, "")
    texts = {header: _texts(data, header, file) for header in ("sources", "methods")}
    for header in ("title", "extends"):
        if not isinstance(data.get(header, ""), str):
            raise _wrong(file, header, "must be text", data[header])
    for section, (levels, pattern, units) in _SECTIONS.items():
        for key, fields in _leaves(data.get(section, {}), section, levels, file):
            yield key, _entry(fields, key, file, texts, pattern, units)


def _leaves(data: Any, key: str, levels: tuple[tuple[str, ...] | None, ...], file: str) -> Iterator[tuple[str, Any]]:
    if not levels:
        yield key, data
        return
    _check_keys(data, levels[0], file, key)
    for name, below in data.items():
        yield from _leaves(below, f"{key}.{name}", levels[1:], file)


def _entry(
    fields: Any, key: str, file: str, texts: dict[str, dict[str, str]], pattern: str, units: str
) -> dict[str, Any]:
    _check_keys(fields, _FIELDS, file, key)
    for name in _REQUIRED:
        # Only a node may be null: not every source states one.
        if name not in fields or (fields[name] is None and name != "node"):
            raise InputError(f"unit-cost table {file!r}: {key} has no {name}: an entry needs {', '.join(_REQUIRED)}")
    _number(fields["value"], f"{key}.value", file)
    if fields["node"] is not None:
        _number(fields["node"], f"{key}.node", file)
    if not (isinstance(fields["unit"], str) and re.fullmatch(pattern, fields["unit"])):
        raise _wrong(file, f"{key}.unit", f"must be {units}", fields["unit"])
    if fields["status"] not in ("published", "derived"):
        raise _wrong(file, f"{key}.status", "must be 'published' or 'derived'", fields["status"])
    if (fields["status"] == "derived") != ("how" in fields):
        raise InputError(
            f"unit-cost table {file!r}: {key} is {fields['status']}: "
            f"`how` names the method of a derived entry, and belongs to no other"
        )
    bounds = fields.get("range")
    if bounds is not None:
        if not (isinstance(bounds, list) and len(bounds) == 2):
            raise _wrong(file, f"{key}.range", "must be [least, greatest]", bounds)
        for bound in bounds:
            _number(bound, f"{key}.range", file)
    named = {"source": ("sources", fields["source"]), "how": ("methods", fields.get("how"))}
    resolved = {field: _text(texts, header, name, f"{key}.{field}", file) for field, (header, name) in named.items()}
    return {**fields, **resolved, "range": tuple(bounds) if bounds else None}


def _text(texts: dict[str, dict[str, str]], header: str, name: Any, key: str, file: str) -> str:
    if name is None:
        return ""
    if name not in texts[header]:
        error = unknown(f"name in {key}", str(name), texts[header])
        raise InputError(f"unit-cost table {file!r}: {error} (under {header})")
    return texts[header][name]


def _texts(data: Mapping[str, Any], header: str, file: str) -> dict[str, str]:
    texts = data.get(header, {})
    _check_keys(texts, None, file, header)
    for name, text in texts.items():
        if not isinstance(text, str) or not text:
            raise _wrong(file, f"{header}.{name}", "must be text", text)
    return dict(texts)


def _check_keys(data: Any, allowed: Iterable[str] | None, file: str, key: str) -> None:
    if not isinstance(data, Mapping):
        raise _wrong(file, key or "the file", "must be a mapping", data)
    for name in data:
        if allowed is not None and name not in allowed:
            raise InputError(
                f"unit-cost table {file!r}: {unknown(f'key in {key}' if key else 'key', str(name), allowed)}"
            )


def _number(value: Any, key: str, file: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(file, key, "must be a number", value)
    if value < 0:
        raise _wrong(file, key, "must not be negative", value)


def _wrong(file: str, key: str, rule: str, value: Any) -> InputError:
    return InputError(f"unit-cost table {file!r}: {key} {rule}, not {value!r}")
