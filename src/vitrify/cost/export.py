"""Workloads in other simulators' formats: SCALE-Sim's topology, ZigZag's workload. Both hold the products alone."""

from __future__ import annotations

import csv
import io
from typing import Any

import yaml

from vitrify.cost.graph import Operation, Workload


def to_scalesim(workload: Workload) -> str:
    """Return SCALE-Sim's topology in its GEMM form, a row "name, M, N, K," per product.

    Run it with `-i gemm` and, as SCALE-Sim 3 wants one, a layout file (`-l`) with nothing but a header line.
    SCALE-Sim has no count: each head's product, and each group's of a convolution, has a row of its own, so that its
    totals are the model's. It knows no primitives and no widths either.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    # Each row ends with a comma: the reader drops what follows the last one.
    writer.writerow(["Layer", "M", "N", "K", ""])
    for operation in _products(workload):
        for number in range(operation.count):
            suffix = f".{number}" if operation.count > 1 else ""
            writer.writerow([f"{_name(operation)}{suffix}", operation.m, operation.n, operation.k, ""])
    return text.getvalue()


def to_zigzag(workload: Workload) -> str:
    """Return ZigZag's workload as YAML: a Gemm per product, with widths and where its operands come from.

    I is the left operand and W the right, also where both are activations. ZigZag's nodes are products only, so an
    operand's source is the last product that it depends on; an operand that no product made names its own layer, which
    is how ZigZag writes a constant.

    ZigZag finds no mapping for operands that are wider than the machine's registers: its example machines have 8 bits,
    and 16 for sums.
    """
    numbers: dict[str, int] = {}
    sources: dict[str, int] = {}
    layers = []
    for operation in workload.operations:
        own = numbers.setdefault(operation.id, len(numbers)) if operation.kind != "vector" else None
        made = [sources.get(o.producer) if o.producer is not None else None for o in operation.inputs]
        if own is not None:
            layers.append(_layer(operation, own, made))
            sources[operation.id] = own
        elif known := [source for source in made if source is not None]:
            sources[operation.id] = max(known)
    return yaml.safe_dump(layers, sort_keys=False, default_flow_style=None)


def _layer(operation: Operation, number: int, sources: list[int | None]) -> dict[str, Any]:
    # A count is a loop around the product; a linear layer has none.
    batched = operation.count > 1
    b = "[b]" if batched else ""
    left, right, sums = operation.bits
    return {
        "id": number,
        "name": _name(operation),
        "operator_type": "Gemm",
        "equation": f"O{b}[d][k]+=I{b}[d][c]*W{b}[c][k]",
        "dimension_relations": [],
        "loop_dims": [*(["B"] if batched else []), "D", "K", "C"],
        "loop_sizes": [*([operation.count] if batched else []), operation.m, operation.n, operation.k],
        "operand_precision": {"I": left, "W": right, "O": sums, "O_final": operation.outputs[0].bits},
        "operand_source": {
            name: number if source is None else source for name, source in zip("IW", sources, strict=False)
        },
    }


def _products(workload: Workload) -> list[Operation]:
    return [operation for operation in workload.operations if operation.kind != "vector"]


def _name(operation: Operation) -> str:
    return "_".join(filter(None, (operation.id, operation.module.replace(",", "_"), operation.step)))
