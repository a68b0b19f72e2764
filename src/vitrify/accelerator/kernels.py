"""Vector work outside of attention as jobs: kernels (norms, activations, additions), portion by portion."""

from __future__ import annotations

from collections.abc import Sequence

from vitrify.accelerator.grids import PORTIONS, Grid, cuts
from vitrify.accelerator.lower import Lowering
from vitrify.accelerator.placement import base, elements, sums, width
from vitrify.accelerator.program import Job, Tile
from vitrify.cost.graph import Operand, Operation

_ROW_CHUNK = 64


def lower_kernel(low: Lowering, indices: Sequence[int]) -> None:
    """Add the jobs of vector work outside of attention that runs as one kernel: portion by portion, all operations.

    Where rows are summed (norms) portions are of rows; else they are those of what the kernel reads. Where it is
    tokens that are summed, each operation waits for the whole of the one before.
    """
    operations = [low.plan.placements[index].operation for index in indices]
    if len(indices) > 1 and any(_mixes_tokens(operation) for operation in operations):
        for index in indices:
            lower_kernel(low, [index])
        return
    source = None if any(sums(operation) for operation in operations) else _followed(low, indices[0])
    if source is not None:
        groups, rows, edges, columns = source.groups, source.rows, source.edges, source.columns
    else:
        groups, columns = 1, False
        rows = max(
            _all_rows(o) for o in operations[0].inputs if o.kind == "activation" or len(operations[0].inputs) == 1
        )
        edges = [end / rows for _, end in cuts(rows, _ROW_CHUNK, PORTIONS)]
    grids = {index: Grid(groups, rows, edges, [[] for _ in range(groups)], columns) for index in indices}
    made = {o.tensor: index for index, operation in zip(indices, operations, strict=True) for o in operation.outputs}
    recent: dict[int, list[Job]] = {index: [] for index in indices}
    for group in range(groups):
        spans = list(zip([0.0, *edges[:-1]], edges, strict=True))
        jobs: list[dict[int, Job]] = [{} for _ in spans]
        for portion, index in _wave(len(spans), indices):
            job = _portion(low, index, grids, made, jobs[portion], recent[index], group, *spans[portion], source)
            jobs[portion][index] = job
            recent[index] = [*recent[index][-1:], job]
    for index, operation in zip(indices, operations, strict=True):
        grid = grids[index]
        if _mixes_tokens(operation):
            everything = [job for portions in grid.jobs for portion in portions for job in portion]
            bits = elements(operation.outputs[0]) * width(operation.outputs[0], low.hardware)
            done = low.publish(index, operation.outputs[0].tensor, bits, everything[-1])
            grid = Grid(1, _all_rows(operation.outputs[0]), (1.0,), [[(*everything, *done)]])
        for each in operation.outputs:
            low.grids[each.tensor] = grid


def _wave(portions: int, indices: Sequence[int]) -> list[tuple[int, int]]:
    """Return (portion, operation) in the queues' order: a portion begins when the one before is half through.

    So a unit that a kernel needs twice does not wait for a portion's end before it begins with the next.
    """
    order = {
        (portion, at): portion + 2 * at / len(indices) for portion in range(portions) for at in range(len(indices))
    }
    return [(portion, indices[at]) for portion, at in sorted(order, key=lambda cell: (order[cell], cell))]


def _portion(
    low: Lowering,
    index: int,
    grids: dict[int, Grid],
    made: dict[str, int],
    jobs: dict[int, Job],
    recent: Sequence[Job],
    group: int,
    begin: float,
    end: float,
    source: Grid | None,
) -> Job:
    """Queue one operation's share of a portion."""
    operation = low.plan.placements[index].operation
    groups, rows = grids[index].groups, grids[index].rows
    after, chained = [*low.small(index)], []
    for operand in operation.inputs:
        if operand.kind == "weight":
            continue
        producer = made.get(base(operand.tensor))
        if producer is not None and producer in jobs:
            chained.append(jobs[producer])
            continue
        found = low.grid(operand)
        if found is source:
            needed = list(found.jobs[group][len(grids[index].jobs[group])])
        else:
            needed = found.need(groups, group, max(1, _all_rows(operand) // groups), begin, end)
        if not low.stays(base(operand.tensor)):
            part = elements(operand) * width(operand, low.hardware) * (end - begin) / groups
            needed = [low.load(index, part, needed, recent[:1])]
        after += needed
    tile = Tile(group, (round(begin * rows), round(end * rows)), (0, 0))
    job = low.lanes(index, operation.elements * (end - begin) / groups, after, tile, chained)
    if _mixes_tokens(operation):
        grids[index].jobs[group].append((job,))
    else:
        output = operation.outputs[0]
        bits = elements(output) * width(output, low.hardware) * (end - begin) / groups
        grids[index].jobs[group].append(low.publish(index, output.tensor, bits, job))
    return job


def _mixes_tokens(operation: Operation) -> bool:
    """Say whether the output has fewer rows than what is read."""
    return _all_rows(operation.outputs[0]) < max(
        (_all_rows(o) for o in operation.inputs if o.kind == "activation"), default=0
    )


def _followed(low: Lowering, index: int) -> Grid | None:
    """Return the grid of an operand that the work goes through element by element, whole."""
    operation = low.plan.placements[index].operation
    for operand in operation.inputs:
        whole = elements(operand) == elements(operation.outputs[0]) and "[" not in operand.tensor
        if operand.kind == "activation" and whole:
            grid = low.grid(operand)
            if len(grid.edges) * grid.groups > 1:
                return grid
    return None


def _all_rows(operand: Operand) -> int:
    return max(1, elements(operand) // operand.shape[-1]) if operand.shape else 1
