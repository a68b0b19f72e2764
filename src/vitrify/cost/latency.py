"""The time of a workload on a target, by operation and by module: a roofline per kernel. How: LATENCY.md.

>>> from vitrify.cost.graph import Operand, Operation, Workload
>>> x, w = Operand("x", (4096, 1024), 32, "activation"), Operand("w", (4096, 1024), 32, "weight")
>>> y = Operand("op0.out", (4096, 4096), 32, "activation", "op0")
>>> fc1 = Operation("op0", "mlp.fc1", "matmul", (x, w), (y,), m=4096, k=1024, n=4096)
>>> result = latency(Workload("one layer", (4096, 1024), (fc1,), {}), target="h100")
>>> f"{result.seconds * 1e6:.0f} us, limited by {result.operations[0].limit}"
'55 us, limited by arithmetic'
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from vitrify.cost import target_file
from vitrify.cost.fusion import Fusion, Kernel, bytes_of, kernels
from vitrify.cost.graph import Operand, Operation, OpKind, Primitive, Workload
from vitrify.cost.measured import Measurements
from vitrify.cost.roofline import Limit, Roofline, Time
from vitrify.cost.target_file import DTYPES, Target
from vitrify.errors import unknown


@dataclass(frozen=True)
class OperationLatency:
    """The part of its kernel's time that one operation takes.

    kernel    number of the kernel in the order of running; operations of one kernel share it
    seconds   the kernel's time by the operations' own arithmetic, or evenly if it has none
    limit     what the kernel's time is spent on: "arithmetic", "bytes" or "launch"
    measured  whether the time was measured on the target's machine, and not computed
    """

    id: str
    module: str
    step: str
    kind: OpKind
    primitive: Primitive
    kernel: int
    seconds: float
    limit: Limit
    measured: bool = False


@dataclass(frozen=True)
class Latency:
    """What `latency` found.

    operations   one for each operation of the workload, in the order in which the kernels run
    times        the time of each kernel, in the same order
    weight_bytes, activation_bytes   bytes of all weights, and of the largest kernel's operands and results
    fits         whether both fit in the target's memory
    unknown      the workload's operators that no rule knows: charged for their bytes alone
    """

    model: str
    target: Target
    dtype: str
    fusion: Fusion
    operations: tuple[OperationLatency, ...]
    times: tuple[Time, ...]
    weight_bytes: float
    activation_bytes: float
    unknown: Mapping[str, int]

    @property
    def seconds(self) -> float:
        """The time of one forward pass."""
        return sum(operation.seconds for operation in self.operations)

    @property
    def fits(self) -> bool:
        """Whether the weights and the largest kernel's operands fit in the target's memory together."""
        return self.weight_bytes + self.activation_bytes <= self.target.si("memory.size")

    def modules(self) -> dict[str, float]:
        """Return seconds by module, each with all that is inside it; "" is the whole model."""
        found: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            parts = operation.module.split(".") if operation.module else []
            for length in range(len(parts) + 1):
                found[".".join(parts[:length])] += operation.seconds
        return dict(found)

    def __str__(self) -> str:
        limits: dict[str, float] = defaultdict(float)
        for operation in self.operations:
            limits[operation.limit] += operation.seconds
        shares = ", ".join(f"{name} {100 * part / (self.seconds or 1):.0f} %" for name, part in sorted(limits.items()))
        lines = [
            f"{self.model} on {self.target.name} ({self.dtype}, {self.fusion}): {self.seconds * 1e3:.3g} ms in "
            f"{len(self.times)} kernels; limited by {shares}"
        ]
        if not self.fits:
            lines.append(f"it does not fit: {self.weight_bytes + self.activation_bytes:.3g} bytes")
        if self.unknown:
            lines.append(f"charged for their bytes alone, as no rule knows them: {', '.join(self.unknown)}")
        return "\n".join(lines)


def latency(
    workload: Workload,
    target: str | Path | Target,
    *,
    dtype: str | None = None,
    fusion: Fusion | None = None,
    eight_bit: str = "int8",
    measured: str | Path | None = None,
    weight_bytes: float | None = None,
) -> Latency:
    """Return the time of one forward pass on a target, by operation.

    target      a name (`target_file.names()`: h100, a100, cpu, ...) or a file's path; `vitrify probe` writes one
    dtype       the float that the model runs in: fp32, tf32, bf16 or fp16; by default the target's own
    fusion      "eager": each call is a kernel; "compiled": element-wise kernels join the one that made their operand;
                by default as the target says (GPUs: "compiled")
    eight_bit   what products of two 8-bit operands run as: "int8" or "fp8"
    measured    a folder of `vitrify bench` results: attention cores measured on this target's machine, in the same
                dtype and shape, take the place of their computed time
    weight_bytes   bytes of all weights, where the workload is that of a part of a model: what does not fit in the
                cache together comes from memory

    Raises InputError for an unknown target, dtype, fusion or format, a faulty target file, and products in a format
    that the target does not have, by the operation's id.
    """
    machine = target if isinstance(target, Target) else target_file.load(target)
    fusion = machine.fusion if fusion is None else fusion
    if fusion not in get_args(Fusion):
        raise unknown("fusion", str(fusion), get_args(Fusion))
    dtype = machine.dtype if dtype is None else dtype
    bits = DTYPES.get(dtype, 32)
    if weight_bytes is None:
        weight_bytes = sum(bytes_of(operand, bits) for operand in weights_of(workload).values())
    roofline = Roofline.of(machine, dtype, eight_bit, fusion, weight_bytes)
    found = kernels(workload, fusion)
    times = [roofline.time(kernel) for kernel in found]
    known = Measurements.read(measured, machine) if measured is not None else None
    operations: list[OperationLatency] = []
    for number, (kernel, time) in enumerate(zip(found, times, strict=True)):
        operations += _shares(kernel, number, time, roofline)
    if known is not None:
        operations = _corrected(operations, workload, known, roofline)
    return Latency(
        model=workload.model,
        target=machine,
        dtype=roofline.dtype,
        fusion=fusion,
        operations=tuple(operations),
        times=tuple(times),
        weight_bytes=weight_bytes,
        activation_bytes=max((_traffic(kernel, bits) for kernel in found), default=0.0),
        unknown=workload.unknown,
    )


def _shares(kernel: Kernel, number: int, time: Time, roofline: Roofline) -> list[OperationLatency]:
    own = [roofline.arithmetic_s(operation) for operation in kernel.operations]
    total = sum(own)
    return [
        OperationLatency(
            id=operation.id,
            module=operation.module,
            step=operation.step,
            kind=operation.kind,
            primitive=operation.primitive,
            kernel=number,
            seconds=time.seconds * (part / total if total else 1 / len(own)),
            limit=time.limit,
        )
        for operation, part in zip(kernel.operations, own, strict=True)
    ]


def _corrected(
    operations: list[OperationLatency], workload: Workload, known: Measurements, roofline: Roofline
) -> list[OperationLatency]:
    """Return the operations with the time of each attention core that was measured in the place of the computed one."""
    found = {operation.id: operation for operation in operations}
    for core in _cores(workload):
        seconds = known.core_s(
            "taylor" if core[0].step in ("M", "apply") else "softmax",
            dtype=roofline.dtype,
            fusion=roofline.fusion,
            **_shape(core),
        )
        computed = sum(found[operation.id].seconds for operation in core)
        if seconds is not None:
            for operation in core:
                own = found[operation.id]
                found[operation.id] = replace(own, seconds=own.seconds * seconds / computed, measured=True)
    return [found[operation.id] for operation in operations]


def _cores(workload: Workload) -> list[list[Operation]]:
    """Return the operations of each fused softmax attention, and of each first-order Taylor attention."""
    fused: dict[str, list[Operation]] = defaultdict(list)
    taylor: dict[str, list[Operation]] = defaultdict(list)
    for operation in workload.operations:
        if operation.step in ("qk", "softmax", "av"):
            fused[operation.id.partition(".")[0]].append(operation)
        elif operation.step in ("M", "apply"):
            taylor[operation.module].append(operation)
    cores = [core for core in fused.values() if {"qk", "av"} <= {op.step for op in core if op.kind == "matmul"}]
    return cores + [core for core in taylor.values() if sum(op.kind == "matmul" for op in core) == 2]


def _shape(core: list[Operation]) -> dict[str, int]:
    first, second = (operation for operation in core if operation.kind == "matmul")
    # Q K^T is n x d by d x n, and K^T V d x n by n x d; what is not square in the tokens has none of its own.
    keys, tokens = (first.n, first.m) if first.step == "qk" else (first.k, second.m)
    dim, value_dim = (first.k, second.n) if first.step == "qk" else (second.k, second.n)
    same = keys == tokens and dim == value_dim
    return {"tokens": tokens if same else 0, "instances": first.count, "head_dim": dim}


def weights_of(workload: Workload) -> dict[str, Operand]:
    """Return the weights that a workload reads, by name."""
    return {o.tensor: o for operation in workload.operations for o in operation.inputs if o.kind == "weight"}


def _traffic(kernel: Kernel, bits: int) -> float:
    return sum(bytes_of(operand, bits) for operand in (*kernel.reads, *kernel.writes) if operand.kind == "activation")
