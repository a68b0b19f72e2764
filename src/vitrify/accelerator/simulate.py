"""`simulate`: a workload on an accelerator, tile by tile. See README.md.

>>> from vitrify.cost.graph import Operand, Operation, Workload
>>> operands = (Operand("x", (197, 192), 8, "activation"), Operand("w", (192, 576), 8, "weight"))
>>> out = (Operand("op0.out", (197, 576), 8, "activation", "op0"),)
>>> layer = Operation("op0", "qkv", "matmul", operands, out, m=197, k=192, n=576)
>>> result = simulate(Workload("one layer", (197, 192), (layer,), {}), "vitality")
>>> result.cycles > 197 * 192 * 576 / 4096, round(result.utilisation["general"], 2) > 0.6
(True, True)
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast, get_args

from vitrify.accelerator.hardware import Hardware, load
from vitrify.accelerator.heads import lower_heads
from vitrify.accelerator.kernels import lower_kernel
from vitrify.accelerator.layers import TileTooSmallError, least_cycles, lower_layer
from vitrify.accelerator.lower import Action, Lowering, Plan
from vitrify.accelerator.masks import Masks, synthetic_for
from vitrify.accelerator.placement import Drain, Mapping, Order, Placement, base
from vitrify.accelerator.prices import Prices
from vitrify.accelerator.program import DRAM, Job, Queue, run
from vitrify.accelerator.result import OperationCost, Result
from vitrify.accelerator.schedules import SCHEDULES, Schedule, depthwise_on_lanes
from vitrify.accelerator.sparse import DENSITIES
from vitrify.cost.graph import Primitive, Workload
from vitrify.errors import InputError, unknown

Objective = Literal["latency", "energy", "edp"]
TILES = (2, 8, 16, 32, 128, 512, 2048)
"""Tile sizes in KiB that `simulate` tries, as far as they fit."""
LIMITS = (8, 16, 32, 64, 128, 256)
"""Parts of larger arrays that it tries, so that more PEs are never slower."""


def simulate(
    workload: Workload,
    hardware: str | Path | Hardware,
    *,
    schedule: str | Schedule | None = None,
    pipeline: bool = True,
    drain: Drain = "overlapped",
    masks: Masks | None = None,
    objective: Objective = "latency",
    mappings: Sequence[Mapping] | None = None,
) -> Result:
    """Return what a forward pass takes on an accelerator: cycles, energy, area, utilisation, stalls.

    hardware    a preset by name, a description by path, or one loaded and changed
    schedule    a name of `schedules.SCHEDULES` or a function like those; by default the hardware's own
    pipeline    overlap the steps of attention (the intra-layer pipeline); without it each waits for the one before
    drain       "every_fold": arrays drain between folds, as SCALE-Sim counts; "overlapped": the next fold fills them
    masks       of sparse attention, for hardware that predicts them; else they are synthetic, and the result says so
    objective   by what the best mapping is chosen: "latency", "energy", or "edp", their product. More bandwidth never
                makes the fastest mapping slower, nor do more PEs if the smaller array's sides are among `LIMITS`
    mappings    ways to cut layers into tiles, of which the best is kept; by default every tile size that fits, in
                both orders, on the whole arrays and on their corners

    Deterministic. Raises InputError for unknown names, an engine that the workload needs and the hardware lacks, a
    schedule against the workload's order, and an SRAM too small for any tile, naming the layer.
    """
    machine = load(hardware)
    name = machine.schedule if schedule is None else schedule
    if isinstance(name, str) and name not in SCHEDULES:
        raise unknown("schedule", name, SCHEDULES)
    if drain not in get_args(Drain):
        raise unknown("drain", str(drain), get_args(Drain))
    if objective not in get_args(Objective):
        raise unknown("objective", str(objective), get_args(Objective))
    function = SCHEDULES[name] if isinstance(name, str) else name
    notes = [f"charged nothing, as no rule knows them: {', '.join(workload.unknown)}"] if workload.unknown else []
    workload = depthwise_on_lanes(workload, machine)
    if masks is None and name in DENSITIES and any(operation.step == "qk" for operation in workload.operations):
        masks = synthetic_for(workload, DENSITIES[str(name)])
    placements = list(function(workload, machine, masks))
    if masks is not None and any(placement.kept for placement in placements):
        notes.append(f"masks {masks.source}, density {masks.density:.3g}")
    _check(placements, machine)
    plan = Plan(machine, placements, pipeline, drain)
    best, refused = _best(workload, plan, mappings, objective, notes)
    if best is None:
        raise InputError(
            f"hardware {machine.name!r}: its sram_kib of {machine.sram_kib:g} is too small for any tile: "
            + (refused or f"five of {TILES[0]} KiB must fit")
        )
    return best


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage among the jobs: there is none, and it takes over half the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def _best(
    workload: Workload, plan: Plan, mappings: Sequence[Mapping] | None, objective: Objective, notes: Sequence[str]
) -> tuple[Result | None, str]:
    """Return the result of the best mapping, or why the last one was refused."""
    prices = Prices(plan.hardware)
    best: tuple[float, Result] | None = None
    refused = ""
    for mapping in candidates(plan.hardware) if mappings is None else mappings:
        try:
            if mapping.room(plan.hardware) < 0:
                continue
            if best is not None and objective == "latency" and least_cycles(plan, mapping) >= best[0]:
                continue
            low = lower(plan, mapping)
        except TileTooSmallError as error:
            refused = str(error)
            continue
        cycles, queues = run(low.jobs)
        if best is not None and objective == "latency" and cycles >= best[0]:
            continue
        result = _result(workload, plan, low, cycles, queues, prices, notes)
        score = {"latency": float(cycles), "energy": result.total_pj, "edp": cycles * result.total_pj}[objective]
        if best is None or score < best[0]:
            best = score, result
    return best[1] if best else None, refused


def _check(placements: Sequence[Placement], hardware: Hardware) -> None:
    """Raise InputError for engines that the hardware lacks, and for operations before those whose results they read."""
    made: set[str] = set()
    for placement in placements:
        operation = placement.operation
        if placement.engine and placement.engine not in hardware.engines:
            kind = f"engine of hardware {hardware.name!r}, for {operation.id} ({operation.module}),"
            raise unknown(kind, placement.engine, hardware.engines)
        for operand in operation.inputs:
            if operand.producer is not None and base(operand.tensor) not in made:
                raise InputError(
                    f"the schedule runs {operation.id} ({operation.module}) before {operand.producer}, whose result "
                    f"{operand.tensor!r} it reads: a schedule must keep to the workload's dependencies"
                )
        made |= {output.tensor for output in operation.outputs}


def candidates(hardware: Hardware) -> Iterator[Mapping]:
    """Give the mappings that `simulate` tries: of sizes and limits that are no hardware's own, those that it has."""
    sides = max(max(array.rows, array.columns) for array in hardware.arrays.values()) if hardware.arrays else 0
    for limit in (None, *(limit for limit in reversed(LIMITS) if limit < sides)):
        for tile in reversed(TILES):
            for order in get_args(Order):
                if Mapping(tile, order).room(hardware) >= 0:
                    yield Mapping(tile, order, limit)


def lower(plan: Plan, mapping: Mapping) -> Lowering:
    """Return the program of a plan: all its jobs, in an order in which they can run."""
    low = Lowering(plan, mapping)
    for run_ in plan.runs:
        placement = plan.placements[run_[0].index]
        if not placement.engine:
            low.alias(run_[0].index)
        elif run_[0].outputs:
            lower_heads(low, run_)
        elif placement.operation.kind == "vector":
            lower_kernel(low, [stage.index for stage in run_])
        else:
            lower_layer(low, run_[0].index)
    low.finish()
    return low


def _result(
    workload: Workload,
    plan: Plan,
    low: Lowering,
    cycles: int,
    queues: dict[str, Queue],
    prices: Prices,
    notes: Sequence[str],
) -> Result:
    energy = dict.fromkeys([*plan.hardware.engines, "registers", "sram", "noc", DRAM], 0.0)
    bits: defaultdict[str, float] = defaultdict(float)
    macs: defaultdict[str, float] = defaultdict(float)
    per_operation = []
    for actions in low.actions:
        before = sum(energy.values())
        for action, count in actions.items():
            _charge(action, count, prices, energy, bits, macs)
        per_operation.append(sum(energy.values()) - before)
    spans = _spans(low.jobs)
    operations = [
        OperationCost(
            placement.operation.id,
            placement.operation.module,
            placement.operation.step,
            placement.engine,
            *spans.get(index, (0, 0, 0)),
            per_operation[index],
        )
        for index, placement in enumerate(plan.placements)
    ]
    return Result(
        workload.model,
        plan.hardware,
        low.mapping,
        cycles,
        queues,
        dict(energy),
        prices.areas(),
        dict(bits),
        dict(macs),
        operations,
        plan.placements,
        low.jobs,
        notes,
    )


def _charge(
    action: Action,
    count: float,
    prices: Prices,
    energy: dict[str, float],
    bits: dict[str, float],
    macs: dict[str, float],
) -> None:
    kind = action[0]
    if kind == "mac":
        _, engine, primitive, left, right = action
        energy[engine] += count * prices.product(cast(Primitive, primitive), int(left), int(right))
        energy["registers"] += count * prices.registers(cast(Primitive, primitive), int(left), int(right))
        macs[engine] += count
    elif kind == "lane":
        energy[action[1]] += count * prices.scalar(action[2])
    elif kind == DRAM:
        energy[DRAM] += count * prices.levels[DRAM]
        bits[f"{DRAM} {action[1]}"] += count
    else:
        energy["sram"] += count * prices.levels[f"sram {action[1]}"]
        energy["noc"] += count * prices.levels["noc"]
        bits[f"sram {action[1]}"] += count
        bits["noc"] += count


def _spans(jobs: Sequence[Job]) -> dict[int, tuple[int, int, int]]:
    """Return for each placement its first start, its last result, and the cycles of its engine."""
    spans: dict[int, tuple[int, int, int]] = {}
    for job in jobs:
        if job.resource == DRAM:
            continue
        first, last, busy = spans.get(job.operation, (job.start, 0, 0))
        spans[job.operation] = min(first, job.start), max(last, job.ready), busy + job.duration
    return spans
