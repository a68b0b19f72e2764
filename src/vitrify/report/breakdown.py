"""Where a simulated run's time and energy went, by group of modules and step of attention; and what waited for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vitrify.accelerator.placement import Placement, kernel
from vitrify.accelerator.program import DRAM, Job
from vitrify.accelerator.result import Result
from vitrify.cost.explain.groups import Group, Layout, within
from vitrify.cost.graph import Workload

END = "after the last product"
_STEPS = ("predict", "codes", "qk", "softmax", "av", "1", "2", "3", "4", "5", "6", "M", "apply", "bias")


def step_name(step: str) -> str:
    """Return the group of a step of attention: "attention qk", "attention step 1" (of Algorithm 1)."""
    return f"attention step {step}" if step.isdigit() else f"attention {step}"


ORDER = (
    "patch embedding",
    "norms, residuals",
    "qkv",
    *map(step_name, _STEPS),
    "attention core",
    "proj",
    "MLP",
    "convolutions",
    "head",
    "others",
    END,
)
"""Groups, in the order in which a block runs them."""


@dataclass
class Share:
    """What one group took, in cycles and pJ.

    array, waited   the main array at work for it, and idle until it could begin: over all groups, the whole run
    vectors, dram   all units of vector engines, and the DRAM channel, at work for it beside that
    """

    array: int = 0
    waited: int = 0
    vectors: int = 0
    dram: int = 0
    pj: float = 0.0


class Stall(NamedTuple):
    """Cycles in which the main array was idle, by the group that it could not begin and what that waited for."""

    group: str
    reason: str
    cycles: int


@dataclass
class Use:
    """What one queue did in the whole run, in cycles: these add up to it.

    working   computing, or moving data; port: only waiting for its SRAM port
    operand   idle until an operand was there, or slowed down by the engine whose results it takes as they come
    dram      idle until a load or a store was done
    outside   before its first and after its last job
    """

    working: int
    port: int
    operand: int
    dram: int
    outside: int


@dataclass
class Breakdown:
    """A result by group and by queue.

    main     the largest array, "" if there is none
    groups   of each placement
    stalls   of the main array, the longest first
    blocks   around attention modules, "blocks.3" say: first and last cycle
    """

    main: str
    groups: list[str]
    shares: dict[str, Share]
    stalls: list[Stall]
    uses: dict[str, Use]
    blocks: dict[str, tuple[int, int]]


def main_array(result: Result) -> str:
    """Return the array with the most PEs, the first of equal ones: "" if the hardware has none that worked."""
    arrays = {name: array.pes for name, array in result.hardware.arrays.items() if name in result.queues}
    return max(arrays, key=lambda name: arrays[name], default="")


def groups_of(workload: Workload, layout: Layout) -> dict[str, str]:
    """Return the group of each operation by its id: those of `ORDER`.

    Projections before an attention module's own steps are its "qkv", those behind them its "proj".
    """
    found: dict[str, str] = {}
    coarse = layout.groups(workload)
    begun: set[str] = set()
    for operation in workload.operations:
        group: Group = coarse[operation.id]
        if operation.step:
            begun.add(next((name for name in layout.attention if within(operation.module, [name])), ""))
            found[operation.id] = step_name(operation.step)
        elif group == "projections":
            behind = any(within(operation.module, [name]) for name in begun)
            found[operation.id] = "proj" if behind else "qkv"
        else:
            found[operation.id] = group
    return found


def breakdown(result: Result, groups: Mapping[str, str]) -> Breakdown:
    """Return where a run's time and energy went.

    groups: of operations by id (`groups_of`)
    """
    main = main_array(result)
    names = [_group(placement, groups) for placement in result.placements]
    shares: dict[str, Share] = {name: Share() for name in sorted({*names, END}, key=_rank)}
    stalls: Counter[tuple[str, str]] = Counter()
    until = 0
    for job in result.jobs:
        share = shares[names[job.operation]]
        if job.resource == DRAM:
            share.dram += job.duration
        elif job.resource not in result.hardware.arrays:
            share.vectors += job.duration
        if job.resource == main:
            share.array += job.end - job.start
            share.waited += job.start - until
            if job.start > until:
                stalls[names[job.operation], _reason(job, until, names)] += job.start - until
            until = job.end
    shares[END].waited = result.cycles - until
    for name, cost in zip(names, result.operations, strict=True):
        shares[name].pj += cost.pj
    return Breakdown(
        main,
        names,
        {name: share for name, share in shares.items() if share != Share()},
        [Stall(group, reason, cycles) for (group, reason), cycles in stalls.most_common()],
        {name: _use(result, name) for name in _in_order(result)},
        _blocks(result),
    )


def _group(placement: Placement, groups: Mapping[str, str]) -> str:
    operation = placement.operation
    if operation.step:
        return step_name(operation.step)
    # What a schedule splits is named after what it was: "op6.mul".
    return groups.get(operation.id) or groups.get(kernel(operation), "others")


def _rank(name: str) -> int:
    return ORDER.index(name) if name in ORDER else ORDER.index("others")


def _reason(job: Job, until: int, names: list[str]) -> str:
    """Say what let a job begin last (the rule of `program.run`), past loads and stores that only waited themselves."""
    cause, what = _cause(job)
    through = ""
    while cause.resource == DRAM and cause.waits and cause.start > until:
        cause, _ = _cause(cause)
        through = ", through the DRAM"
    place = "DRAM" if cause.resource == DRAM else f"{names[cause.operation]} on {cause.resource}"
    return f"{what}{place}{through if cause.resource != DRAM else ''}"


def _cause(job: Job) -> tuple[Job, str]:
    causes = [(other.ready, other, "") for other in job.after]
    causes += [(other.end, other, "the buffer of ") for other in job.frees]
    causes += [(other.start + behind, other, "") for other, behind in job.streams]
    _, cause, what = max(causes, key=lambda each: each[0])
    return cause, what


def _in_order(result: Result) -> list[str]:
    """Return the queues: arrays by size, then units of vector engines in the hardware's order, then the DRAM."""
    engines = list(result.hardware.engines)

    def rank(name: str) -> tuple[int, int]:
        if name in result.hardware.arrays:
            return 0, -result.hardware.arrays[name].pes
        return (2, 0) if name == DRAM else (1, engines.index(name.partition(" ")[0]))

    return sorted(result.queues, key=rank)


def _use(result: Result, name: str) -> Use:
    queue = result.queues[name]
    idle, dram = queue.idle["operand"], queue.idle[DRAM]
    # Jobs that take another's results as they come end no sooner than those: that is neither busy nor idle.
    behind = queue.last - queue.first - queue.busy - idle - dram
    outside = result.cycles - (queue.last - queue.first)
    return Use(queue.busy - queue.port, queue.port, idle + behind, dram, outside)


def _blocks(result: Result) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    names = dict.fromkeys(_block(cost.module) for cost in result.operations if cost.step)
    for name in names:
        spans = [(cost.start, cost.end) for cost in result.operations if cost.engine and within(cost.module, [name])]
        if name and spans:
            found[name] = min(start for start, _ in spans), max(end for _, end in spans)
    return found


def _block(module: str) -> str:
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ""
