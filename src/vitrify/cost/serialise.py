"""Workloads as JSON, by the schema in workload.schema.json, and what makes a graph whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from vitrify.cost.graph import Operand, Operation, Workload
from vitrify.cost.schema_check import check_schema
from vitrify.errors import InputError

FORMAT, VERSION = "vitrify-workload", 1


@cache
def schema() -> Mapping[str, Any]:
    """Return the JSON schema of a workload."""
    data: Mapping[str, Any] = json.loads(files("vitrify.cost").joinpath("workload.schema.json").read_text("utf-8"))
    return data


def to_json(workload: Workload) -> str:
    """Return the workload as JSON text; `from_json` reads it back."""
    return json.dumps({"format": FORMAT, "version": VERSION, **asdict(workload)})


def from_json(text: str) -> Workload:
    """Return the workload that JSON text describes.

    Raises InputError naming the place where the text does not fit the schema, or the graph is not whole.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"this workload is not JSON: {error}") from error
    check_schema(data, schema(), schema(), "workload")
    workload = Workload(
        model=data["model"],
        input_shape=tuple(data["input_shape"]),
        operations=tuple(_operation(operation) for operation in data["operations"]),
        unknown=data["unknown"],
    )
    check_graph(workload)
    return workload


def check_graph(workload: Workload) -> None:
    """Raise InputError unless ids are unique, and every tensor read was written before, by the operation it names."""
    written: dict[str, str] = {}
    seen: set[str] = set()
    for operation in workload.operations:
        if operation.id in seen:
            raise InputError(f"operation {operation.id} is there twice")
        for operand in operation.inputs:
            # "op3.out[1]" is a part of "op3.out".
            whole = operand.tensor.partition("[")[0]
            if operand.producer is not None and written.get(whole) != operand.producer:
                raise InputError(
                    f"{operation.id} reads {operand.tensor} from {operand.producer}, which does not write it before"
                )
        seen.add(operation.id)
        for operand in operation.outputs:
            if operand.tensor in written or operand.producer != operation.id:
                raise InputError(f"{operation.id} writes {operand.tensor}, which {operand.producer} is said to write")
            written[operand.tensor] = operation.id


def _operation(data: Mapping[str, Any]) -> Operation:
    lists = {
        "inputs": tuple(_operand(operand) for operand in data["inputs"]),
        "outputs": tuple(_operand(operand) for operand in data["outputs"]),
        "bits": tuple(data["bits"]),
    }
    return Operation(**{**data, **lists})


def _operand(data: Mapping[str, Any]) -> Operand:
    return Operand(**{**data, "shape": tuple(data["shape"])})
