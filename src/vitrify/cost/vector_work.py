"""What element-wise work costs: the table's price of each scalar operation, and the bits it moves."""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import groupby

from vitrify.cost.charges import Prices
from vitrify.cost.graph import Operand, Operation, Workload
from vitrify.cost.split import Split

_PRICED = {"mul": "multiply"}
_ONE_OPERAND = ("exp", "sqrt", "erf", "tanh")


def vector_energies(workload: Workload, prices: Prices) -> dict[str, Split]:
    """Return the energy of each vector operation by its id.

    Operands come from the SRAM and results go there, once for each run of neighbouring operations of one module and
    step: what passes between those stays in registers. DRAM is charged to the matmuls on either side.
    """
    runs = _runs(workload)
    made_in = {operand.tensor: runs[op.id] for op in workload.operations if op.id in runs for operand in op.outputs}
    readers: dict[str, set[int | None]] = defaultdict(set)
    for operation in workload.operations:
        for operand in operation.inputs:
            readers[operand.tensor].add(runs.get(operation.id))
    fetched: set[tuple[int, str]] = set()
    energies = {}
    for operation in workload.operations:
        if operation.id not in runs:
            continue
        run, bits = runs[operation.id], 0
        for operand in operation.inputs:
            if made_in.get(operand.tensor) != run and (run, operand.tensor) not in fetched:
                fetched.add((run, operand.tensor))
                bits += _bits(operand)
        for operand in operation.outputs:
            if readers[operand.tensor] != {run}:
                bits += _bits(operand)
        energies[operation.id] = _energy(operation, bits, prices)
    return energies


def _runs(workload: Workload) -> dict[str, int]:
    """Return the number of the run that each vector operation belongs to, by its id."""
    runs: dict[str, int] = {}
    groups = groupby(workload.operations, key=lambda op: (op.kind == "vector", op.module, op.step))
    for number, ((vector, _, _), operations) in enumerate(groups):
        if vector:
            runs.update((operation.id, number) for operation in operations)
    return runs


def _energy(operation: Operation, sram_bits: int, prices: Prices) -> Split:
    sram = sram_bits * prices.per_bit["sram"]
    if operation.vector is None or operation.vector == "move":
        return Split(sram=sram)
    bits = max((operand.bits for operand in operation.inputs), default=operation.bits[0])
    # Wider than 32 bits are indices.
    operands = 1 if operation.vector in _ONE_OPERAND else 2
    scalar = prices.scalar("energy", _PRICED.get(operation.vector, operation.vector), bits, floating=bits in (16, 32))
    return Split(
        compute=operation.elements * scalar,
        register=operation.elements * (operands + 1) * bits * prices.per_bit["register"],
        sram=sram,
    )


def _bits(operand: Operand) -> int:
    return math.prod(operand.shape) * operand.bits
