"""Workloads made by hand, and Hypothesis strategies for them and for hardware."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hypothesis import strategies as st

from vitrify.accelerator.hardware import load
from vitrify.cost.graph import Operand, Operation, Workload


def linear(number, rows, inner, columns, source="x", primitive="multiply", weight_bits=8):
    """A linear layer op<number> that reads `source`."""
    producer = source.removesuffix(".out") if source.endswith(".out") else None
    operands = (
        Operand(source, (rows, inner), 8, "activation", producer),
        Operand(f"layer{number}.weight", (inner, columns), weight_bits, "weight"),
    )
    out = Operand(f"op{number}.out", (rows, columns), 8, "activation", f"op{number}")
    return Operation(
        f"op{number}",
        f"layer{number}",
        "matmul",
        operands,
        (out,),
        primitive=primitive,
        m=rows,
        k=inner,
        n=columns,
        bits=(8, weight_bits, 24),
    )


def vector(number, shape, source, kind="add"):
    """Element-wise work op<number> on `source`."""
    operand = Operand(source, shape, 8, "activation", source.removesuffix(".out"))
    out = Operand(f"op{number}.out", shape, 8, "activation", f"op{number}")
    elements = shape[0] * shape[1]
    return Operation(f"op{number}", f"act{number}", "vector", (operand,), (out,), vector=kind, elements=elements)


def chain(rows, widths):
    """Linear layers of these widths one after the other, with vector work between them."""
    operations, source = [], "x"
    for number, (inner, columns) in enumerate(pairwise(widths)):
        operations.append(linear(2 * number, rows, inner, columns, source))
        operations.append(vector(2 * number + 1, (rows, columns), f"op{2 * number}.out"))
        source = f"op{2 * number + 1}.out"
    return Workload("chain", (rows, widths[0]), tuple(operations), {})


chains = st.builds(chain, st.integers(1, 300), st.lists(st.integers(1, 400), min_size=2, max_size=5))


def machine(rows=16, columns=16, kib=64, gb_per_s=8.0, dataflows=("output", "weight", "input")):
    """The plain array with other figures."""
    base = load("systolic")
    array = replace(base.engines["array"], rows=rows, columns=columns, dataflows=dataflows)
    dram = replace(base.dram, gb_per_s=gb_per_s)
    return replace(base, engines={**base.engines, "array": array}, sram_kib=kib, dram=dram)
