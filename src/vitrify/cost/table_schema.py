"""What a file of figures may say: its sections, names, units and fields, and the errors that name file and key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vitrify.errors import InputError, unknown

FORMATS = ("fp32", "fp16", "bf16", "fp8", "int32", "int16", "int8", "int4")
OPERATIONS = ("multiply", "add", "shift", "exp", "div", "sqrt", "erf", "tanh", "compare")
LEVELS = ("dram", "sram", "noc", "noc_psum", "register", "register_weight", "sram_8kb", "sram_32kb", "sram_1mb")

# Names allowed at each level below a section (None: any), the pattern of its units, and those units in words.
Section = tuple[tuple[tuple[str, ...] | None, ...], str, str]


@dataclass(frozen=True)
class Form:
    """What one kind of file may say.

    what        what its errors call it
    header      keys beside the sections that hold plain text
    sections    see Section
    required    the fields of every entry
    statuses    where a figure may come from -> whether `how` must then name a method
    """

    what: str
    header: tuple[str, ...]
    sections: Mapping[str, Section]
    required: tuple[str, ...]
    statuses: Mapping[str, bool]


UNIT_COSTS = Form(
    what="unit-cost table",
    header=("title", "extends"),
    sections={
        "energy": ((OPERATIONS, FORMATS), r"pJ", "pJ"),
        "area": (((*OPERATIONS, "register"), (*FORMATS, "bit")), r"um2", "um2"),
        "access": ((LEVELS,), r"(pJ|MAC)/([1-9]\d*)?bit", "pJ/bit, pJ/16bit, MAC/16bit or the like"),
        "dram": ((None,), r"pJ/([1-9]\d*)?bit", "pJ/bit, pJ/64bit or the like"),
        # By capacity in KiB, then by the port's width in bits.
        "sram_read": ((None, None), r"pJ/([1-9]\d*)?bit", "pJ/bit, pJ/64bit or the like"),
        "sram_write": ((None, None), r"pJ/([1-9]\d*)?bit", "pJ/bit, pJ/64bit or the like"),
        "sram_area": ((None, None), r"mm2", "mm2"),
        "sram_leakage": ((None, None), r"mW", "mW"),
        "scaling": ((("energy", "area"), None), r"ratio", "ratio"),
    },
    required=("value", "unit", "node", "source", "status"),
    statuses={"published": False, "derived": True, "measured": True},
)


def check(data: Any, file: str, form: Form = UNIT_COSTS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (dotted key, fields) of each entry, with `source` and `how` replaced by the text that they name.

    Raises InputError naming `file` and the key for anything that the form does not allow.
    """
    yield from _Check(file, form).entries(data)


@dataclass(frozen=True)
class _Check:
    """One file under its form."""

    file: str
    form: Form

    def entries(self, data: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        self._keys(data, [*self.form.header, "sources", "methods", *self.form.sections], "")
        texts = {header: self._texts(data, header) for header in ("sources", "methods")}
        for header in self.form.header:
            if not isinstance(data.get(header, ""), str):
                raise self._wrong(header, "must be text", data[header])
        for section, (levels, pattern, units) in self.form.sections.items():
            for key, fields in self._leaves(data.get(section, {}), section, levels):
                yield key, self._entry(fields, key, texts, pattern, units)

    def _leaves(self, data: Any, key: str, levels: tuple[tuple[str, ...] | None, ...]) -> Iterator[tuple[str, Any]]:
        if not levels:
            yield key, data
            return
        self._keys(data, levels[0], key)
        for name, below in data.items():
            yield from self._leaves(below, f"{key}.{name}", levels[1:])

    def _entry(
        self, fields: Any, key: str, texts: dict[str, dict[str, str]], pattern: str, units: str
    ) -> dict[str, Any]:
        required, statuses = self.form.required, self.form.statuses
        self._keys(fields, (*required, "how", "range"), key)
        for name in required:
            # Only a node may be null: not every source states one.
            if name not in fields or (fields[name] is None and name != "node"):
                raise self._error(f"{key} has no {name}: an entry needs {', '.join(required)}")
        self._number(fields["value"], f"{key}.value")
        if fields.get("node") is not None:
            self._number(fields["node"], f"{key}.node")
        if not (isinstance(fields["unit"], str) and re.fullmatch(pattern, fields["unit"])):
            raise self._wrong(f"{key}.unit", f"must be {units}", fields["unit"])
        if fields["status"] not in statuses:
            raise self._wrong(f"{key}.status", f"must be {' or '.join(map(repr, statuses))}", fields["status"])
        if statuses[fields["status"]] != ("how" in fields):
            explained = " or ".join(status for status, needed in statuses.items() if needed)
            raise self._error(
                f"{key} is {fields['status']}: `how` names the method of a {explained} entry, and belongs to no other"
            )
        bounds = fields.get("range")
        if bounds is not None:
            if not (isinstance(bounds, list) and len(bounds) == 2):
                raise self._wrong(f"{key}.range", "must be [least, greatest]", bounds)
            for bound in bounds:
                self._number(bound, f"{key}.range")
        named = {"source": ("sources", fields["source"]), "how": ("methods", fields.get("how"))}
        resolved = {field: self._text(texts, header, name, f"{key}.{field}") for field, (header, name) in named.items()}
        return {"node": None, **fields, **resolved, "range": tuple(bounds) if bounds else None}

    def _text(self, texts: dict[str, dict[str, str]], header: str, name: Any, key: str) -> str:
        if name is None:
            return ""
        if name not in texts[header]:
            raise self._error(f"{unknown(f'name in {key}', str(name), texts[header])} (under {header})")
        return texts[header][name]

    def _texts(self, data: Mapping[str, Any], header: str) -> dict[str, str]:
        texts = data.get(header, {})
        self._keys(texts, None, header)
        for name, text in texts.items():
            if not isinstance(text, str) or not text:
                raise self._wrong(f"{header}.{name}", "must be text", text)
        return dict(texts)

    def _keys(self, data: Any, allowed: Iterable[str] | None, key: str) -> None:
        if not isinstance(data, Mapping):
            raise self._wrong(key or "the file", "must be a mapping", data)
        for name in data:
            if allowed is not None and name not in allowed:
                raise self._error(f"{unknown(f'key in {key}' if key else 'key', str(name), allowed)}")

    def _number(self, value: Any, key: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, "must be a number", value)
        if value < 0:
            raise self._wrong(key, "must not be negative", value)

    def _wrong(self, key: str, rule: str, value: Any) -> InputError:
        return self._error(f"{key} {rule}, not {value!r}")

    def _error(self, message: str) -> InputError:
        return InputError(f"{self.form.what} {self.file!r}: {message}")
