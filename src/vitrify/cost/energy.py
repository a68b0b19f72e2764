"""The energy of a workload on a modelled machine, and the area of its operation units. How: ENERGY.md.

>>> from vitrify.cost.graph import Operation, Workload
>>> layer = Operation("op0", "mlp.fc1", "matmul", (), (), m=784, k=64, n=512)
>>> result = energy(Workload("one layer", (1, 784, 64), (layer,), {}), preset="as_published")
>>> round(result.total_pj / layer.macs, 2), round(result.compare[0].pj["INT8 multiply"] / layer.macs, 2)
(46.12, 10.8)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from vitrify.cost.charges import CONTENDERS, Prices
from vitrify.cost.eyeriss import Machine, Tiling
from vitrify.cost.graph import Operation, OpKind, Primitive, Workload
from vitrify.cost.presets import PRESETS, Model, contender_of
from vitrify.cost.split import Split
from vitrify.cost.vector_work import vector_energies
from vitrify.errors import unknown

TARGETS: Mapping[str, Machine] = {"eyeriss": Machine()}


@dataclass(frozen=True)
class OperationEnergy:
    """The energy of one operation of the workload, all its `count` layers together; vector work has no tiling."""

    id: str
    module: str
    step: str
    kind: OpKind
    primitive: Primitive
    macs: int
    split: Split
    tiling: Tiling | None


@dataclass(frozen=True)
class Comparison:
    """The matmuls of one group: equal layers of all blocks, "blocks.*.attn.qkv", and a step of attention.

    pj    energy in pJ: "as built"; "as built, multiplied" (a multiplication at the widths as built); and with each
          contender of `charges.CONTENDERS` in its place
    """

    group: str
    primitives: tuple[Primitive, ...]
    macs: int
    pj: Mapping[str, float]


@dataclass(frozen=True)
class Energy:
    """What `energy` found.

    operations     one for each operation of the workload, in its order
    compare        one row for each group of matmuls and convolutions
    area_um2       of one PE's operation unit (a product and its accumulation) for each contender, and for each
                   primitive as built under "as built: ..."
    pes            how many PEs the target has
    tables         the unit costs in use, with their sources
    unknown        the workload's operators that no rule knows: charged nothing
    """

    model: str
    target: str
    preset: str
    operations: tuple[OperationEnergy, ...]
    compare: tuple[Comparison, ...]
    area_um2: Mapping[str, float]
    pes: int
    prices: Prices
    unknown: Mapping[str, int]

    @property
    def total(self) -> Split:
        """The sum over all operations."""
        return sum((operation.split for operation in self.operations), Split())

    @property
    def total_pj(self) -> float:
        """The energy of the whole workload in pJ."""
        return self.total.total_pj

    @property
    def vector_pj(self) -> float:
        """The part that is element-wise work, which no primitive changes."""
        return sum(operation.split.total_pj for operation in self.operations if operation.kind == "vector")

    def __str__(self) -> str:
        """The split, pJ per product of each group with every contender, and their areas, in plain text."""
        total = self.total
        parts = ", ".join(f"{name} {100 * part / (total.total_pj or 1):.0f} %" for name, part in vars(total).items())
        groups = max([len(row.group) for row in self.compare], default=0)
        columns = list(self.compare[0].pj) if self.compare else []
        lines = [
            f"{self.model} on {self.target}, {self.preset}: {total.total_pj * 1e-9:.4g} mJ ({parts})",
            f"unit costs: {self.prices.operations.title}; pJ per product:",
            "  ".join([" " * groups, *columns]),
        ]
        for row in self.compare:
            cells = (f"{value / (row.macs or 1):{len(name)}.2f}" for name, value in row.pj.items())
            lines.append("  ".join([f"{row.group:{groups}}", *cells]))
        areas = ", ".join(f"{name} {area:,.0f}" for name, area in self.area_um2.items())
        lines.append(f"area of the operation unit of each of {self.pes} PEs, um2: {areas}")
        if self.unknown:
            lines.append(f"charged nothing, as no rule knows them: {', '.join(self.unknown)}")
        return "\n".join(lines)


def energy(
    workload: Workload,
    target: str = "eyeriss",
    preset: str = "like_for_like",
    *,
    unit_costs: str = "horowitz45",
    dram: str | None = None,
) -> Energy:
    """Return the energy of one forward pass, by operation and by where it is spent, and a table of alternatives.

    target        the modelled machine: "eyeriss", 192 PEs, row-stationary
    preset        "like_for_like" charges every access and every accumulation at its real width; "as_published"
                  repeats ShiftAddViT's accounting, faults included
    unit_costs    a table of `cost/tables` by name, or a YAML file of the same form by path
    dram          an entry of the table "dram" (hbm2, lpddr4, ddr4, horowitz); by default the target's own 12.5 pJ/bit

    Raises InputError for an unknown target, preset, table or DRAM, a faulty table, and an operation whose widths have
    no price, by its id.
    """
    if target not in TARGETS:
        raise unknown("target", target, TARGETS)
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    model = Model(TARGETS[target], PRESETS[preset], Prices.from_tables(unit_costs, dram))
    vector = vector_energies(workload, model.prices) if model.preset.vector else {}
    operations: list[OperationEnergy] = []
    groups: dict[str, list[tuple[Operation, float]]] = defaultdict(list)
    for op in workload.operations:
        split, tiling = vector.get(op.id, Split()), None
        if op.kind != "vector":
            split, tiling = model.built(op)
            groups[_group(op)].append((op, split.total_pj))
        operations.append(OperationEnergy(op.id, op.module, op.step, op.kind, op.primitive, op.macs, split, tiling))
    areas = {name: model.area(contender) for name, contender in CONTENDERS.items()}
    for op in workload.operations:
        if op.kind != "vector":
            areas[f"as built: {op.primitive} {' x '.join(map(str, op.bits[:2]))}"] = model.area(contender_of(op))
    compare = tuple(_comparison(group, members, model) for group, members in groups.items())
    return Energy(
        workload.model,
        target,
        preset,
        tuple(operations),
        compare,
        areas,
        model.machine.pes,
        model.prices,
        workload.unknown,
    )


def _group(operation: Operation) -> str:
    """Return the module's name with its numbers starred, and the step: all blocks are one group."""
    name = ".".join("*" if part.isdigit() else part for part in operation.module.split("."))
    return f"{name} {operation.step}".strip()


def _comparison(group: str, members: list[tuple[Operation, float]], model: Model) -> Comparison:
    pj = {"as built": sum(built_pj for _, built_pj in members)}
    for operation, _ in members:
        for name, value in model.alternatives(operation).items():
            pj[name] = pj.get(name, 0.0) + value
    primitives = tuple(sorted({operation.primitive for operation, _ in members}))
    return Comparison(group, primitives, sum(operation.macs for operation, _ in members), pj)
