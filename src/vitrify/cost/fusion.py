"""Which operations run as one kernel, and what each kernel reads and writes: the notion of fusion in LATENCY.md."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from vitrify.cost.graph import Operand, Operation, Workload

Fusion = Literal["eager", "compiled"]


@dataclass(frozen=True)
class Kernel:
    """Operations that run in one go, and the tensors that go in and out of them: what passes between them does not."""

    operations: tuple[Operation, ...]
    reads: tuple[Operand, ...]
    writes: tuple[Operand, ...]


def kernels(workload: Workload, fusion: Fusion) -> list[Kernel]:
    """Return the kernels of a workload in order.

    "eager": those that the framework runs, one for each call. "compiled": element-wise kernels join the kernel that
    made the last of their operands, so that what they read from it stays in registers.
    """
    groups: dict[int, list[Operation]] = defaultdict(list)
    group_of: dict[str, int] = {}
    for number, members in enumerate(_calls(workload)):
        own = {operation.id for operation in members}
        makers = [
            group_of[operand.producer]
            for operation in members
            for operand in operation.inputs
            if operand.producer is not None and operand.producer not in own
        ]
        elementwise = all(operation.kind == "vector" for operation in members)
        # The latest maker: whatever else it waits for was there before that, so joining makes no circle.
        group = max(makers) if fusion == "compiled" and elementwise and makers else number
        groups[group] += members
        group_of.update(dict.fromkeys(own, group))
    return _with_traffic([groups[number] for number in sorted(groups)], group_of)


def _calls(workload: Workload) -> list[list[Operation]]:
    """Return the operations by the call that made them: "op7", "op7.1", "op7.2" are one."""
    calls: dict[str, list[Operation]] = defaultdict(list)
    for operation in workload.operations:
        calls[operation.id.partition(".")[0]].append(operation)
    return list(calls.values())


def _with_traffic(groups: list[list[Operation]], group_of: dict[str, int]) -> list[Kernel]:
    readers: dict[str, set[int]] = defaultdict(set)
    for members in groups:
        for operation in members:
            for operand in operation.inputs:
                readers[_whole(operand)].add(group_of[operation.id])
    found = []
    for members in groups:
        number = group_of[members[0].id]
        made = {_whole(operand) for operation in members for operand in operation.outputs}
        reads = {o.tensor: o for operation in members for o in operation.inputs if _whole(o) not in made}
        writes = {
            operand.tensor: operand
            for operation in members
            for operand in operation.outputs
            # What nobody reads is a result of the model.
            if readers[operand.tensor] != {number}
        }
        found.append(Kernel(tuple(members), tuple(reads.values()), tuple(writes.values())))
    return found


def _whole(operand: Operand) -> str:
    """Return the name of the tensor that an operand is a part of: "op3.out[1]" is a part of "op3.out"."""
    return operand.tensor.partition("[")[0]


def bytes_of(operand: Operand, bits: int) -> float:
    """Return the bytes of an operand of a model that runs in floats of so many bits, as which codes pass, too."""
    width = bits if operand.bits in (1, 16, 32) else operand.bits
    return math.prod(operand.shape) * width / 8
