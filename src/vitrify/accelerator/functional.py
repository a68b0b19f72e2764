"""A simulated program run on numbers, job by job, at the cycles that `simulate` gave its jobs.

It says whether a schedule is a correct program and not only a count. Results appear when their job's latency is over,
loads fill two buffers in turn, and what is stored leaves the SRAM; whatever is not there is poison. A job that reads
such rows (its dependency is missing), or loses an operand while it runs, raises ScheduleError. Where none does, the
result equals `ops.taylor.quantised` bit for bit.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from vitrify.accelerator.placement import array_of, base
from vitrify.accelerator.program import DRAM, Job, Tile
from vitrify.accelerator.result import Result
from vitrify.accelerator.steps import steps_of
from vitrify.accelerator.systolic import Product, best
from vitrify.cost.graph import Operation
from vitrify.errors import InputError, VitrifyError
from vitrify.ops.fixed_point import check_fits
from vitrify.ops.taylor.quantised import Affine, Algorithm1

POISON = -(2**62)
"""What a buffer holds before anything is written to it, and after it was given away: no data path reaches it."""
INPUTS = ("input", "input1", "input2")
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
    machine = _Machine(result, attention, dict(zip(INPUTS, (query, key, value), strict=True)))
    machine.run()
    output = result.placements[-1].operation.outputs[0]
    return machine.stored(output.tensor).reshape(output.shape)


class _Machine:
    """Memories and engines; tensors are (groups, rows, columns).

    dram       the inputs, and what was stored
    sram       results, from when they are ready until they are stored
    buffers    by (operation, tensor): what was loaded for an operation, two portions at a time
    sums       by (operation, group): what an engine has accumulated
    held, made   by job: the operands that it has read so far, and what it will write
    """

    def __init__(self, result: Result, attention: Algorithm1 | Affine, inputs: Mapping[str, Tensor]) -> None:
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
        self.held: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self.made: dict[int, Tensor] = {}
        self.now = 0
        for operation in self.operations:
            for operand in (*operation.inputs, *operation.outputs):
                name, (*outer, rows, columns) = base(operand.tensor), operand.shape
                empty = torch.full((math.prod(outer), rows, columns), POISON)
                self.sram[name], self.dram[name] = empty, empty.clone()
                if operand.producer is None and name in inputs:
                    if inputs[name].shape != operand.shape:
                        raise InputError(f"{name} has shape {tuple(inputs[name].shape)}, the workload {operand.shape}")
                    self.dram[name] = inputs[name].long().reshape(empty.shape).clone()

    def stored(self, tensor: str) -> Tensor:
        """Return a tensor that left the chip; ScheduleError if part of it did not."""
        return self._there(self.dram[tensor], f"{tensor} in DRAM")

    def run(self) -> None:
        """Do all jobs."""
        order, queue = count(), []
        for job in self.result.jobs:
            queue += [(cycle, kind, next(order), job) for kind, cycle in _events(job)]
            if job.resource == DRAM and self._loads(job):
                self.buffers.setdefault((job.operation, job.tensor), torch.full_like(self.dram[job.tensor], POISON))
        heapq.heapify(queue)
        while queue:
            self.now, kind, _, job = heapq.heappop(queue)
            if job.tile is None:
                raise InputError(f"{job.resource}: a job of {self.operations[job.operation].id} has no tile")
            if self._empty(job, job.tile):
                continue
            if job.resource == DRAM:
                self._move(kind, job, job.tile)
            elif kind == _READY:
                self._write(job, job.tile)
            elif kind == _END:  # nothing that it reads may have been given away meanwhile
                self._read(job, job.tile, streamed=True)
                self._read(job, job.tile, streamed=False)
            else:
                self._work(job, job.tile, streamed=kind == _STREAMED)

    def _empty(self, job: Job, tile: Tile) -> bool:
        """Say whether a tile holds nothing: there may be more chunks than rows of one of the operands."""
        product = self.operations[job.operation].kind == "matmul" and job.resource != DRAM
        return tile.rows[0] == tile.rows[1] or (product and tile.inner[0] == tile.inner[1])

    def _loads(self, job: Job) -> bool:
        return job.tensor != self.operations[job.operation].outputs[0].tensor

    def _move(self, kind: int, job: Job, tile: Tile) -> None:
        """Load or store: data leave where they are when the job starts, and are elsewhere when it is ready."""
        key, loads = (job.operation, job.tensor), self._loads(job)
        source = self.dram[job.tensor] if loads else self.sram[job.tensor]
        rows = slice(*tile.rows) if loads else self._output_rows(job, tile)
        if kind == _START:
            self.made[id(job)] = self._there(source[tile.group, rows], self._what(job, job.tensor)).clone()
            if loads:
                self.portions[key].append(tile)
                if len(self.portions[key]) > 2:  # whose buffer is taken over from now on
                    old = self.portions[key].pop(0)
                    self.buffers[key][old.group, slice(*old.rows)] = POISON
        elif kind == _READY:
            target = self.buffers[key] if loads else self.dram[job.tensor]
            target[tile.group, rows] = self.made.pop(id(job))
            if not loads:
                source[tile.group, rows] = POISON

    def _work(self, job: Job, tile: Tile, *, streamed: bool) -> None:
        """Read operands, at the start, or what comes row by row when the last row is there; with all of them, compute.

        What comes row by row is checked once: rows are read in the order in which they are made.
        """
        held = self.held[id(job)]
        held |= self._read(job, tile, streamed=streamed)
        inputs = len(self.operations[job.operation].inputs)
        if len(held) == inputs:
            self.made[id(job)] = self._compute(job, tile, [held[position] for position in range(inputs)])
            del self.held[id(job)]

    def _read(self, job: Job, tile: Tile, *, streamed: bool) -> dict[int, Tensor]:
        """Return the job's operands by position: those that come row by row, or all others."""
        chained = {self.operations[other.operation].outputs[0].tensor for other, _ in job.streams}
        found = {}
        for position, operand in enumerate(self.operations[job.operation].inputs):
            name = base(operand.tensor)
            if (name in chained) == streamed:
                memory = self.buffers.get((job.operation, name), self.sram[name])
                rows = self._operand_rows(job, tile, position, memory.shape[1])
                found[position] = self._there(memory[tile.group, rows], self._what(job, name))
        return found

    def _operand_rows(self, job: Job, tile: Tile, position: int, rows: int) -> slice:
        if self.operations[job.operation].kind != "matmul":
            return slice(0, rows) if rows == 1 else slice(*tile.rows)  # means and sums meet every row
        if self.steps[job.operation].summed:
            return slice(*tile.inner)
        return slice(*tile.rows) if position == 0 else slice(0, rows)

    def _output_rows(self, job: Job, tile: Tile) -> slice:
        rows = self.operations[job.operation].outputs[0].shape[-2]
        return slice(0, rows) if self.steps[job.operation].summed or rows == 1 else slice(*tile.rows)

    def _compute(self, job: Job, tile: Tile, operands: Sequence[Tensor]) -> Tensor:
        operation, step = self.operations[job.operation], self.steps[job.operation]
        if operation.kind == "matmul":
            part = self._product(job, operands[0].mT if step.summed else operands[0], step.operand(operands[1]))
        elif step.summed:
            part = operands[0].sum(-2, keepdim=True)
        else:
            return step.compute(*operands)
        if step.summed:
            # An engine accumulates in the order of its queue, and what the last part completes is written out.
            key, name = (job.operation, tile.group), operation.outputs[0].tensor
            first = (tile.inner if operation.kind == "matmul" else tile.rows)[0] == 0
            if first and name in self.in_place:
                self.sram[name].fill_(POISON)  # the PEs hold one group's
            part = self.sums[key] = part if first else self.sums[key] + part
        return step.compute(check_fits(part, self.partial, operation.id))

    def _product(self, job: Job, left: Tensor, right: Tensor) -> Tensor:
        placement = self.result.placements[job.operation]
        array = array_of(placement, self.result.hardware)
        flows = (placement.dataflow,) if placement.dataflow else array.dataflows
        shape = left.shape[0], left.shape[1], right.shape[1]
        return folded(left, right, best(shape, array.rows, array.columns, flows, self.result.mapping.limit))

    def _write(self, job: Job, tile: Tile) -> None:
        operation = self.operations[job.operation]
        if id(job) not in self.made:
            raise ScheduleError(f"{self._what(job, 'an operand')} comes after its end")
        made = self.made.pop(id(job))
        whole = (tile.inner[1], operation.k) if operation.kind == "matmul" else (tile.rows[1], _tokens(operation))
        if not self.steps[job.operation].summed or whole[0] == whole[1]:
            self.sram[operation.outputs[0].tensor][tile.group, self._output_rows(job, tile)] = made

    def _there(self, data: Tensor, what: str) -> Tensor:
        if bool((data == POISON).any()):
            raise ScheduleError(f"{what} is not there at cycle {self.now}: a dependency is missing")
        return data

    def _what(self, job: Job, tensor: str) -> str:
        return f"{job.resource}, {self.operations[job.operation].id}, {job.tile}: {tensor}"


def _tokens(operation: Operation) -> int:
    return operation.inputs[0].shape[-2]


def _events(job: Job) -> Iterator[tuple[int, int]]:
    yield _START, job.start
    if job.streams:
        yield _STREAMED, max(other.ready for other, _ in job.streams)
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
