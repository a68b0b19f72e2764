"""Attention as jobs: units (a chunk of a head's tokens) go through the stages one behind the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from vitrify.accelerator.grids import Grid
from vitrify.accelerator.lower import Lowering
from vitrify.accelerator.placement import (
    Placement,
    array_of,
    base,
    elements,
    grouping,
    kernel,
    operand_bits,
    partial_bits,
    width,
)
from vitrify.accelerator.program import Job, Tile
from vitrify.accelerator.stages import Stage, sums_over_tokens
from vitrify.accelerator.systolic import best
from vitrify.cost.graph import Operand


def lower_heads(low: Lowering, stages: Sequence[Stage]) -> None:
    """Add the jobs of a run of attention's operations."""
    states = [_State(low, stage) for stage in stages]
    for state in states:
        state.others.update({output.tensor: s for s in states for output in s.operation.outputs})
    before: list[Job] = []
    for state, group, chunk, serial in _units(stages, states, low.plan.pipeline):
        if serial:  # without the pipeline, a step begins when the one before it has ended
            low.barrier, before = before, []
        job = state.run(group, chunk)
        if job is not None:
            before.append(job)
    low.barrier = []
    for state in states:  # no circles, so that the jobs are gone when nothing refers to them
        state.others.clear()


def _units(
    stages: Sequence[Stage], states: Sequence[_State], pipeline: bool
) -> Iterator[tuple[_State, int, int, bool]]:
    """Give (stage, group, chunk, whether it must wait for all before) in the order of the queues."""
    groups, chunks = stages[0].groups, stages[0].chunks
    if not pipeline:
        for group in range(groups):
            for state in states:
                for chunk in range(chunks):
                    yield state, group, chunk, chunk == 0
        return
    units = groups * chunks
    for step in range(units + max(stage.lag for stage in stages)):
        for stage, state in zip(stages, states, strict=True):
            if not 0 <= step - stage.lag < units or state.placement.in_place:
                continue
            group, chunk = divmod(step - stage.lag, chunks)
            yield state, group, chunk, False
            if chunk == chunks - 1:  # what stays in the PEs is used there before the next head's takes its place
                for reader in filter(state.keeps_for, states):
                    yield from ((reader, group, each, False) for each in range(chunks))


class _State:
    """A stage at work."""

    def __init__(self, low: Lowering, stage: Stage) -> None:
        self.low, self.stage = low, stage
        self.placement: Placement = low.plan.placements[stage.index]
        self.operation = self.placement.operation
        self.groups, self.rows = grouping(self.operation)
        self.activations = [o for o in self.operation.inputs if o.kind == "activation"]
        self.small = low.small(stage.index)
        edges = [(chunk + 1) / stage.chunks for chunk in range(stage.chunks)] if stage.mode == "rows" else [1.0]
        grid = Grid(self.groups, self._output_rows(), edges, [[] for _ in range(self.groups)])
        for output in self.operation.outputs:
            low.grids[output.tensor] = grid
        self.grid = grid
        self.recent: list[Job] = []
        self.fetched: dict[tuple[str, int], Job] = {}
        self.others: dict[str, _State] = {}

    def _output_rows(self) -> int:
        shape = self.operation.outputs[0].shape
        return shape[-2] if len(shape) > 1 else 1

    def run(self, group: int, chunk: int) -> Job | None:
        """Queue one unit and return its job; None if there is nothing to do for it."""
        stage = self.stage
        if stage.mode == "whole" and chunk:
            return None
        parts = 1 if stage.mode == "whole" else stage.chunks
        part = 0 if stage.mode == "whole" else chunk
        after, chained = self._operands(group, part, parts)
        after += self.small
        if self.operation.kind == "matmul":
            job = self._product(group, part, parts, after)
        else:
            job = self._vector(group, part, parts, after, chained)
        self.recent = [*self.recent[-1:], job]
        if stage.mode != "sum" or chunk == stage.chunks - 1:
            self.grid.jobs[group].append(self._publish(group, 1 / parts if stage.mode == "rows" else 1.0, job))
        return job

    def _publish(self, group: int, share: float, job: Job) -> tuple[Job, ...]:
        output = self.operation.outputs[0]
        if self._read_in_place(output.tensor):
            return (job,)
        bits = elements(output) * width(output, self.low.hardware) / self.groups * share * self._kept(group)
        return self.low.publish(self.stage.index, output.tensor, bits, job)

    def _kept(self, group: int) -> float:
        return self.placement.kept[group % len(self.placement.kept)] if self.placement.kept else 1.0

    def _read_in_place(self, tensor: str) -> bool:
        readers = [self.low.plan.placements[i] for i in self.low.plan.readers.get(tensor, ())]
        return bool(readers) and all(r.in_place and base(r.operation.inputs[1].tensor) == tensor for r in readers)

    def _operands(self, group: int, part: int, parts: int) -> tuple[list[Job], list[Job]]:
        """Return what the unit waits for, loading what did not stay in the SRAM, and what it is chained to."""
        found: list[Job] = []
        chained: list[Job] = []
        for position, operand in enumerate(self.activations):
            grid = self.low.grid(operand)
            source = self.others.get(base(operand.tensor))
            if source is not None and source.passes_on_to(self):
                chained.append(source.recent[-1])
                continue
            cut = self._is_cut(position, operand)
            share = (part / parts, (part + 1) / parts) if cut else (0.0, 1.0)
            rows = operand.shape[-2] if len(operand.shape) > 1 else 1
            jobs = grid.need(self.groups, group, self._stored_rows(grid, rows), *share)
            if not self.low.stays(base(operand.tensor)):
                jobs = [self._load(operand, group, share, jobs)]
            found += jobs
        return found, chained

    def keeps_for(self, reader: _State) -> bool:
        """Say whether another stage reads this one's result in the PEs."""
        placement = reader.placement
        return placement.in_place and base(placement.operation.inputs[1].tensor) == self.operation.outputs[0].tensor

    def passes_on_to(self, reader: _State) -> bool:
        """Say whether another stage takes this one's rows as they come: vector work of the same kernel, as far on."""
        ours, theirs = self.stage, reader.stage
        return (
            self.operation.kind == reader.operation.kind == "vector"
            and kernel(self.operation) == kernel(reader.operation)
            and (ours.mode, ours.lag) == ("rows", theirs.lag)
            and theirs.mode == "rows"
            and self.low.plan.pipeline
        )

    def _stored_rows(self, grid: Grid, rows: int) -> int:
        """Return the rows of an operand that may stand transposed: the producer knows which side its rows are."""
        if not sums_over_tokens(self.placement):
            return rows
        return self.operation.k

    def _is_cut(self, position: int, operand: Operand) -> bool:
        if self.stage.mode == "whole":
            return False
        if self.operation.kind == "matmul":
            return position != 1 or self.stage.mode == "sum"
        largest = max(elements(o) for o in (*self.activations, *self.operation.outputs))
        rows = operand.shape[-2] if len(operand.shape) > 1 else 1
        return elements(operand) == largest or rows == self.rows

    def _load(self, operand: Operand, group: int, share: tuple[float, float], after: Sequence[Job]) -> Job:
        """Load a part of an operand; all of it once per group, if a tile's buffers hold it."""
        bits = elements(operand) * width(operand, self.low.hardware) / self.groups
        whole = share == (0.0, 1.0)
        key = (operand.tensor, group)
        if whole and key in self.fetched and bits <= 2 * self.low.tile_bits:
            return self.fetched[key]
        job = self.low.load(self.stage.index, bits * (share[1] - share[0]), after, self.recent[:1])
        rows = operand.shape[-2] if len(operand.shape) > 1 else 1
        job.tensor = base(operand.tensor)
        job.tile = Tile(group, (math.floor(share[0] * rows + 1e-9), math.floor(share[1] * rows + 1e-9)), (0, 0))
        self.fetched[key] = job
        return job

    def _vector(self, group: int, part: int, parts: int, after: Sequence[Job], chained: Sequence[Job]) -> Job:
        count = self.operation.elements / self.groups / parts * self._kept(group)
        rows = (self.rows * part // parts, self.rows * (part + 1) // parts)
        return self.low.lanes(self.stage.index, count, after, Tile(group, rows, (0, 0)), chained)

    def _product(self, group: int, part: int, parts: int, after: Sequence[Job]) -> Job:
        low, operation, placement = self.low, self.operation, self.placement
        array = array_of(placement, low.hardware)
        cut = operation.k if self.stage.mode == "sum" else operation.m
        span = (cut * part // parts, cut * (part + 1) // parts)
        size = span[1] - span[0]
        shape = (operation.m, size, operation.n) if self.stage.mode == "sum" else (size, operation.k, operation.n)
        flows = (placement.dataflow,) if placement.dataflow else array.dataflows
        overlapped = low.plan.drain == "overlapped"
        cost = best(shape, array.rows, array.columns, flows, low.mapping.limit, not overlapped)
        work, latency = (cost.occupied, cost.latency) if overlapped else (cost.every_fold, 0)
        kept = self._kept(group)
        if placement.cycles:
            total = placement.cycles[group % len(placement.cycles)]
            work = total * (part + 1) // parts - total * part // parts
        left, right = operand_bits(operation, array, low.hardware)
        partial = partial_bits(operation, array, low.hardware)
        sums = cost.partial * partial
        if self.stage.mode == "sum" and parts > 1 and cost.dataflow != "output" and not placement.in_place:
            sums += (2 if 0 < part < parts - 1 else 1) * operation.m * operation.n * partial
        read = cost.left * left * kept + (0 if placement.in_place else cost.right * right * kept) + sums / 2
        written = sums / 2
        macs = math.prod(shape) * kept
        actions = low.actions[self.stage.index]
        actions["sram", "read"] += read
        actions["sram", "write"] += written
        actions["mac", placement.engine, operation.primitive, str(left), str(right)] += macs
        duration = max(work, math.ceil(read / array.port_bits), math.ceil(written / array.port_bits))
        ranges = (
            ((0, operation.m), (0, operation.n), span)
            if self.stage.mode == "sum"
            else (
                span,
                (0, operation.n),
                (0, operation.k),
            )
        )
        return low.add(Job(placement.engine, self.stage.index, work, duration, latency, after, Tile(group, *ranges)))
