"""A simulated program run on numbers, job by job, in the order and at the cycles that `simulate` gave its jobs.

It says whether a schedule is a correct program and not only a count. Results appear when their job's latency is over,
loads fill two buffers in turn, and stored results leave the SRAM; whatever is not there is poisoned. A job that reads
such rows (its dependency is missing) or whose operand is overwritten while it runs raises ScheduleError. Where that
does not happen, the result equals `ops.taylor.quantised` bit for bit.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor

from vitrify.accelerator.placement import array_of, base
from vitrify.accelerator.program import DRAM, Job, Tile
from vitrify.accelerator.result import Result
from vitrify.accelerator.stages import sums_over_tokens
from vitrify.accelerator.steps import Step, steps_of
from vitrify.accelerator.systolic import Product, best
from vitrify.cost.graph import Operation
from vitrify.errors import InputError, VitrifyError
from vitrify.ops.fixed_point import check_fits
from vitrify.ops.taylor.quantised import Affine, Algorithm1

POISON = -(2**62)
"""What a buffer holds before anything is written to it, and after it was given away: no data path reaches it."""
_READY, _END, _START, _STREAMED = range(4)  # at the same cycle, in this order


class ScheduleError(VitrifyError):
    """A job reads what is not there (yet, or any more): the schedule is no correct program."""


def execute(result: Result, attention: Algorithm1 | Affine, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the codes of Taylor attention, (B, H, Nq, Dv) int64, as the jobs of `result` compute them.

    result     of `simulate`, on a workload of one attention core alone, called with (query, key, value)
    attention  the integer schedule of that workload's form, whose steps the engines do
    query, key, value   codes (B, H, N, D)

    Raises ScheduleError where a job reads what is not there, and InputError for another workload or shape, and for a
    sum that does not fit its accumulator.
    """
    inputs = dict(zip(("input", "input1", "input2"), (query, key, value), strict=True))
    machine = _Machine(result, attention, inputs)
    machine.run()
    output = result.placements[-1].operation.outputs[0]
    return machine.stored(output.tensor).reshape(output.shape)


class _Machine:
    """Memories and engines.

    dram       tensors as (groups, rows, columns): the inputs, and what was stored
    sram       results, from when they are ready until they are stored
    buffers    by (operation, tensor): what was loaded for an operation, two portions at a time
    """

    def __init__(self, result: Result, attention: Algorithm1 | Affine, inputs: dict[str, Tensor]) -> None:
        self.result = result
        self.operations = [placement.operation for placement in result.placements]
        self.steps = steps_of(self.operations, attention)
        self.partial = attention.widths.partial
        self.in_place = {base(p.operation.inputs[1].tensor) for p in result.placements if p.in_place}
        self.dram: dict[str, Tensor] = {}
        self.sram: dict[str, Tensor] = {}
        self.buffers: dict[tuple[int, str], Tensor] = {}
        self.portions: defaultdict[tuple[int, str], list[Tile]] = defaultdict(list)
        self.sums: dict[tuple[int, int], Tensor] = {}
        self.queue: list[tuple[int, int, int, Job]] = []
        self.held: dict[int, list[Tensor | None]] = {}
        self.made: dict[int, Tensor] = {}
        self.now = 0
        self._allocate(inputs)

    def _allocate(self, inputs: dict[str, Tensor]) -> None:
        for operation in self.operations:
            for operand in (*operation.inputs, *operation.outputs):
                name = base(operand.tensor)
                *outer, rows, columns = operand.shape
                self.sram[name] = torch.full((int(torch.Size(outer).numel()), rows, columns), POISON)
                self.dram[name] = self.sram[name].clone()
                if operand.producer is None and name in inputs:
                    if inputs[name].shape != operand.shape:
                        raise InputError(f"{name} has shape {tuple(inputs[name].shape)}, the workload {operand.shape}")
                    self.dram[name] = inputs[name].long().reshape(self.dram[name].shape).clone()

    def stored(self, tensor: str) -> Tensor:
        """Return a tensor that left the chip; ScheduleError if part of it did not."""
        return self._checked(self.dram[tensor], f"the end of the program, {tensor}")

    def run(self) -> None:
        """Do all jobs."""
        order = count()
        for job in self.result.jobs:
            for kind, cycle in _events(job):
                heapq.heappush(self.queue, (cycle, kind, next(order), job))
        for job in self.result.jobs:
            if job.resource == DRAM and self._is_load(job):
                self.buffers.setdefault((job.operation, job.tensor), torch.full_like(self.dram[job.tensor], POISON))
        while self.queue:
            self.now, kind, _, job = heapq.heappop(self.queue)
            if job.resource == DRAM:
                self._move(kind, job)
            elif kind == _READY:
                self._write(job)
            elif kind == _END:
                self._read(job, streamed=True)  # nothing may have been given away meanwhile
                self._read(job, streamed=False)
            else:
                self._work(kind, job)

    def _is_load(self, job: Job) -> bool:
        return all(output.tensor != job.tensor for output in self.operations[job.operation].outputs)

    def _move(self, kind: int, job: Job) -> None:
        """Load or store: data leave where they are when the job starts, and are there when it is ready."""
        tile = job.tile
        if tile is None or not job.tensor:
            raise InputError(f"a job on the DRAM for {self.operations[job.operation].id} does not say what it moves")
        load = self._is_load(job)
        key = job.operation, job.tensor
        source = self.dram[job.tensor] if load else self.sram[job.tensor]
        rows = slice(*tile.rows) if load else self._output_rows(job)
        if kind == _START:
            self.made[id(job)] = self._checked(source[tile.group, rows], self._what(job, job.tensor)).clone()
            if load:
                self.portions[key].append(tile)
                if len(self.portions[key]) > 2:  # its buffer is taken over from now on
                    old = self.portions[key].pop(0)
                    self.buffers[key][old.group, slice(*old.rows)] = POISON
        elif kind == _READY:
            target = self.buffers[key] if load else self.dram[job.tensor]
            target[tile.group, rows] = self.made.pop(id(job))
            if not load:
                source[tile.group, rows] = POISON

    def _output_rows(self, job: Job) -> slice:
        """Return the rows of its result that a job computes: all of it where rows are summed, or there is but one."""
        assert job.tile is not None
        operation = self.operations[job.operation]
        rows = operation.outputs[0].shape[-2]
        whole = self.steps[job.operation].summed or rows == 1
        return slice(0, rows) if whole else slice(*job.tile.rows)

    def _work(self, kind: int, job: Job) -> None:
        """Read operands: at the start, but those that come row by row when the last row is there. Then compute."""
        held = self.held.setdefault(id(job), [None] * len(self.operations[job.operation].inputs))
        for position, operand in self._read(job, streamed=kind == _STREAMED):
            held[position] = operand
        if all(operand is not None for operand in held):
            operands = [operand for operand in self.held.pop(id(job)) if operand is not None]
            self.made[id(job)] = self._compute(job, operands)

    def _read(self, job: Job, *, streamed: bool) -> list[tuple[int, Tensor]]:
        """Return the job's operands by position: those it is chained to, or all others."""
        tile = job.tile
        assert tile is not None
        operation = self.operations[job.operation]
        chained = {output.tensor for other, _ in job.streams for output in self.operations[other.operation].outputs}
        found = []
        for position, operand in enumerate(operation.inputs):
            name = base(operand.tensor)
            if (name in chained) != streamed:
                continue
            memory = self.buffers.get((job.operation, name), self.sram[name])
            rows = self._operand_rows(operation, position, tile, memory.shape[1])
            found.append((position, self._checked(memory[tile.group, rows], self._what(job, name))))
        return found

    def _operand_rows(self, operation: Operation, position: int, tile: Tile, rows: int) -> slice:
        if operation.kind == "matmul":
            if tile.inner != (0, operation.k):
                return slice(*tile.inner)
            return (
                slice(*tile.rows)
                if position == 0 and rows == operation.m and not self._summed(operation)
                else slice(0, rows)
            )
        return slice(0, rows) if rows == 1 else slice(*tile.rows)

    def _summed(self, operation: Operation) -> bool:
        return self.steps[self.operations.index(operation)].summed

    def _compute(self, job: Job, operands: Sequence[Tensor]) -> Tensor:
        tile, operation, step = job.tile, self.operations[job.operation], self.steps[job.operation]
        assert tile is not None
        if operation.kind != "matmul":
            if not step.summed:
                return step.compute(*operands)
            return self._accumulate(job, operands[0].sum(-2, keepdim=True), first=tile.rows[0] == 0)
        left, right = operands[0], step.operand(operands[1])
        if step.summed:
            left = left.mT
        placement = self.result.placements[job.operation]
        array = array_of(placement, self.result.hardware)
        shape = (left.shape[0], left.shape[1], right.shape[1])
        flows = (placement.dataflow,) if placement.dataflow else array.dataflows
        product = folded(left, right, best(shape, array.rows, array.columns, flows, self.result.mapping.limit))
        if step.summed:
            return self._accumulate(job, product, first=tile.inner[0] == 0)
        return step.compute(check_fits(product, self.partial, operation.id))

    def _accumulate(self, job: Job, part: Tensor, *, first: bool) -> Tensor:
        """Add to an accumulator of the engine, which works in the order of its queue; the last part writes it out."""
        assert job.tile is not None
        key = job.operation, job.tile.group
        if first and self.operations[job.operation].outputs[0].tensor in self.in_place:
            self.sram[self.operations[job.operation].outputs[0].tensor].fill_(POISON)  # the PEs hold one group's
        self.sums[key] = part if first else self.sums[key] + part
        total = check_fits(self.sums[key], self.partial, self.operations[job.operation].id)
        return self.steps[job.operation].compute(total)

    def _write(self, job: Job) -> None:
        tile, operation = job.tile, self.operations[job.operation]
        assert tile is not None
        if id(job) not in self.made:
            raise ScheduleError(f"{self._what(job, 'its operands')} come after its end")
        made = self.made.pop(id(job))
        if self._is_last_part(operation, tile):
            self.sram[operation.outputs[0].tensor][tile.group, self._output_rows(job)] = made

    def _is_last_part(self, operation: Operation, tile: Tile) -> bool:
        """Say whether a sum is complete with this tile."""
        if not self._summed(operation):
            return True
        if operation.kind == "matmul":
            return tile.inner[1] == operation.k
        return tile.rows[1] == operation.inputs[0].shape[-2]

    def _checked(self, data: Tensor, what: str) -> Tensor:
        if bool((data == POISON).any()):
            raise ScheduleError(f"{what} is not there at cycle {self.now}: a dependency is missing")
        return data

    def _what(self, job: Job, tensor: str) -> str:
        return f"{job.resource}, {self.operations[job.operation].id}, {job.tile}: {tensor}"


def _events(job: Job) -> Iterator[tuple[int, int]]:
    yield _START, job.start
    if job.streams:
        yield _STREAMED, max(other.end + other.latency for other, _ in job.streams)
    if job.resource != DRAM:
        yield _END, job.end
    yield _READY, job.ready


def folded(left: Tensor, right: Tensor, how: Product) -> Tensor:
    """Return left @ right fold by fold, as an array of `how.rows` x `how.columns` PEs goes through it."""
    (m, k), n = left.shape, right.shape[1]
    out = torch.zeros(m, n, dtype=torch.long)
    if how.dataflow == "output":
        for rows in _blocks(m, how.rows):
            for columns in _blocks(n, how.columns):
                out[rows, columns] = left[rows] @ right[:, columns]
        return out
    for inner in _blocks(k, how.rows):
        if how.dataflow == "weight":
            for columns in _blocks(n, how.columns):
                out[:, columns] += left[:, inner] @ right[inner, columns]
        else:
            for rows in _blocks(m, how.columns):
                out[rows] += left[rows, inner] @ right[inner]
    return out


def _blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
