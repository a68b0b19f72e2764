"""Checks plain data against a JSON schema (as much of the language as workload.schema.json uses), naming the place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vitrify.errors import InputError

_TYPES: dict[str, type | tuple[type, ...]] = {
    "array": list,
    "boolean": bool,
    "integer": int,
    "null": type(None),
    "number": (int, float),
    "object": dict,
    "string": str,
}
_KEYWORDS = {
    *("$schema", "title", "description", "$defs", "$ref", "type", "enum", "const", "minimum", "exclusiveMinimum"),
    *("required", "properties", "additionalProperties", "items", "minItems", "maxItems"),
}


def check_schema(data: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> None:
    """Raise InputError naming the place in `data`, which `where` leads to, that does not fit the schema.

    root: the whole schema, for its "$defs". Raises NotImplementedError for keywords that are not understood.
    """
    if odd := set(schema) - _KEYWORDS:
        raise NotImplementedError(f"schema keywords {sorted(odd)}")
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "type" in schema:
        types = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        # True and False are integers in Python, and are no numbers in JSON.
        if not any(isinstance(data, _TYPES[name]) and isinstance(data, bool) == (name == "boolean") for name in types):
            raise InputError(f"{where} must be {' or '.join(types)}, not {data!r:.60}")
    if "const" in schema and data != schema["const"]:
        raise InputError(f"{where} must be {schema['const']!r}, not {data!r:.60}")
    if "enum" in schema and data not in schema["enum"]:
        raise InputError(f"{where} must be one of {schema['enum']}, not {data!r:.60}")
    if "minimum" in schema and data < schema["minimum"]:
        raise InputError(f"{where} must be at least {schema['minimum']}, not {data}")
    if "exclusiveMinimum" in schema and data <= schema["exclusiveMinimum"]:
        raise InputError(f"{where} must be above {schema['exclusiveMinimum']}, not {data}")
    if isinstance(data, dict):
        _check_object(data, schema, root, where)
    elif isinstance(data, list):
        _check_array(data, schema, root, where)


def _check_object(data: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> None:
    missing = [name for name in schema.get("required", ()) if name not in data]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, value in data.items():
        place = f"{where}.{name}"
        if name in properties:
            check_schema(value, properties[name], root, place)
        elif others is False:
            raise InputError(f"{place} is unknown: there are {', '.join(properties)}")
        elif others is not True:
            check_schema(value, others, root, place)


def _check_array(data: list[Any], schema: Mapping[str, Any], root: Mapping[str, Any], where: str) -> None:
    low, high = schema.get("minItems", 0), schema.get("maxItems", len(data))
    if not low <= len(data) <= high:
        raise InputError(f"{where} must have {low} to {high} entries, not {len(data)}")
    if "items" in schema:
        for index, value in enumerate(data):
            check_schema(value, schema["items"], root, f"{where}[{index}]")
