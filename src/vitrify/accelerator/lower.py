"""From placements to jobs: tiles, what they wait for, what they move, and the actions that energy is counted from."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vitrify.accelerator.grids import Grid
from vitrify.accelerator.hardware import Hardware, Lanes
from vitrify.accelerator.placement import (
    Drain,
    Mapping,
    Placement,
    base,
    elements,
    grouping,
    is_layer,
    kernel,
    sums,
    width,
)
from vitrify.accelerator.program import DRAM, Job, Tile
from vitrify.accelerator.residency import Lifetime, demands
from vitrify.accelerator.stages import Stage, in_run_bits, runs
from vitrify.cost.graph import Operand
from vitrify.errors import InputError

Action = tuple[str, ...]
"""A counted action: ("mac", engine, primitive, bits, bits), ("lane", engine, kind), ("sram", "read"), ("dram",), ..."""


@dataclass(frozen=True)
class Plan:
    """Placements on hardware, with all that does not depend on how layers are cut: computed once for all mappings."""

    hardware: Hardware
    placements: Sequence[Placement]
    pipeline: bool
    drain: Drain

    @cached_property
    def runs(self) -> list[list[Stage]]:
        """What is lowered together: attention, head by head; the vector work of a kernel; and all else by itself."""
        return runs(self.placements, self.readers, self.pipeline)

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """The placements that read each tensor."""
        found: dict[str, list[int]] = {}
        for index, placement in enumerate(self.placements):
            for name in dict.fromkeys(base(operand.tensor) for operand in placement.operation.inputs):
                found.setdefault(name, []).append(index)
        return found

    @cached_property
    def roots(self) -> dict[str, tuple[str, ...]]:
        """The tensors that hold the data of one that an operation without engine made."""
        found: dict[str, tuple[str, ...]] = {}
        for placement in self.placements:
            if placement.engine:
                continue
            sources = [base(o.tensor) for o in placement.operation.inputs if o.kind == "activation"]
            roots = tuple(dict.fromkeys(root for source in sources for root in found.get(source, (source,))))
            for output in placement.operation.outputs:
                found[output.tensor] = roots
        return found

    @cached_property
    def forwarded(self) -> frozenset[str]:
        """Tensors that go from engine to engine: read once, by vector work of the same kernel."""
        found = set()
        for placement in self.placements:
            for output in placement.operation.outputs:
                readers = [self.placements[index].operation for index in self.readers.get(output.tensor, ())]
                once = len(readers) == 1 and readers[0].kind == "vector" and bool(placement.engine)
                if once and kernel(readers[0]) == kernel(placement.operation):
                    found.add(output.tensor)
        return frozenset(found)

    def demands(self, tile_bits: float) -> dict[str, float]:
        """Return the activation buffer in bits from which on each tensor stays in it.

        In attention's products no weights are fetched, so both of their buffers hold activations.
        """
        spare = {stage.index: 2 * tile_bits for run in self.runs if run[0].outputs for stage in run[1:-1]}
        return demands(self._lifetimes, spare)

    @cached_property
    def _lifetimes(self) -> list[Lifetime]:
        scaled = {**in_run_bits(self.runs), **self._passing()}
        written: dict[str, tuple[int, float]] = {}
        last: dict[str, int] = {}
        for index, placement in enumerate(self.placements):
            if placement.engine:
                for output in placement.operation.outputs:
                    bits = elements(output) * width(output, self.hardware) * scaled.get(output.tensor, 1.0)
                    written[output.tensor] = index, bits
            for operand in placement.operation.inputs:
                for root in self.roots.get(base(operand.tensor), (base(operand.tensor),)):
                    last[root] = index
        return [
            Lifetime(tensor, bits, first, last[tensor])
            for tensor, (first, bits) in written.items()
            if tensor in last and tensor not in self.forwarded
        ]

    def _passing(self) -> dict[str, float]:
        """Return the share that exists at a time of tensors that one kernel takes over portion by portion.

        Layers and kernels hand on at least four portions of all but the smallest tensors, and two exist at a time.
        """
        run_of = {stage.index: number for number, run in enumerate(self.runs) for stage in run if not stage.outputs}
        follows = {
            number
            for number, run in enumerate(self.runs)
            if not run[0].outputs and not any(sums(self.placements[stage.index].operation) for stage in run)
        }
        found = {}
        for index, placement in enumerate(self.placements):
            if index not in run_of:
                continue
            for output in placement.operation.outputs:
                numbers = {run_of.get(reader, -1) for reader in self.readers.get(output.tensor, ())}
                if len(numbers) == 1 and (numbers <= follows or numbers == {run_of[index]}):
                    found[output.tensor] = 0.5
        return found


class Lowering:
    """The program as it grows. `layers.py` and `heads.py` add to it.

    jobs       in the order of every resource's queue
    actions    counted for each placement
    """

    def __init__(self, plan: Plan, mapping: Mapping) -> None:
        self.plan, self.mapping, self.hardware = plan, mapping, plan.hardware
        self.tile_bits = mapping.tile_kib * 8192
        self.room = mapping.room(plan.hardware)
        self._demands = plan.demands(self.tile_bits)
        self.jobs: list[Job] = []
        self.actions: list[defaultdict[Action, float]] = [defaultdict(float) for _ in plan.placements]
        self.grids: dict[str, Grid] = {}
        self.barrier: list[Job] = []
        self._small: dict[int, Job] = {}
        layers = (index for index, placement in enumerate(plan.placements) if is_layer(placement))
        self._first_layer = next(layers, len(plan.placements))
        self._held: list[Job] = []
        self._behind: set[int] = set()
        self._tiles: deque[Job] = deque(maxlen=2)
        self._per_cycle = plan.hardware.dram_bits_per_cycle
        self._dram_latency = math.ceil(plan.hardware.dram.latency_ns * plan.hardware.clock_mhz * 1e-3)

    def finish(self) -> list[Job]:
        """Return all jobs."""
        self.jobs += self._held
        self._held = []
        return self.jobs

    # A tile's operands are fetched while the tile before is computed: their loads enter the DRAM's queue ahead of what
    # that tile writes, and wait only for the buffer, which the tile before that one used. `_held` comes behind them.

    def fetch(self, index: int, bits: float, tile: Tile | None = None) -> Job:
        """Load weights, ahead of the tile in hand."""
        job = self._transfer(index, bits, [], "read", tile)
        job.frees = [self._tiles[0]] if len(self._tiles) == 2 else []
        self.jobs.append(job)
        return job

    def next_tile(self) -> None:
        """Begin the tile that `fetch` and `load` loaded the operands for."""
        self.jobs += self._held
        self._held = []
        self._behind.clear()

    def end_tile(self, last: Job) -> None:
        """Say which job is the last that reads the tile's weights."""
        self._tiles.append(last)

    def add(self, job: Job) -> Job:
        """Queue a job."""
        if self.barrier:
            job.after = [*job.after, *self.barrier]
        self._held.append(job)
        self._behind.add(id(job))
        return job

    def load(self, index: int, bits: float, after: Sequence[Job], frees: Sequence[Job]) -> Job:
        """Load activations that did not stay: ahead of the tile in hand, unless that is what makes them."""
        job = self._transfer(index, bits, after, "read", None)
        job.frees = frees
        if self.barrier or any(id(other) in self._behind for other in (*after, *frees)):
            return self.add(job)
        self.jobs.append(job)
        return job

    def publish(self, index: int, tensor: str, bits: float, job: Job) -> tuple[Job, ...]:
        """Return what a reader of a result waits for: the job, or the store if the tensor does not stay."""
        if tensor in self.plan.forwarded:
            return (job,)
        self.actions[index]["sram", "write"] += bits
        if self.stays(tensor):
            return (job,)
        store = self._transfer(index, bits, [job], "write", job.tile)
        store.tensor = tensor
        return (self.add(store),)

    def _transfer(self, index: int, bits: float, after: Sequence[Job], way: str, tile: Tile | None) -> Job:
        actions = self.actions[index]
        actions["dram", way] += bits
        actions["sram", "write" if way == "read" else "read"] += bits
        cycles = math.ceil(bits / self._per_cycle)
        return Job(DRAM, index, cycles, cycles, self._dram_latency, after, tile)

    def stays(self, tensor: str) -> bool:
        """Say whether an activation stays in the SRAM. The model's inputs and outputs do not."""
        if tensor in self.plan.forwarded:
            return True
        roots = self.plan.roots.get(tensor, (tensor,))
        return all(self._demands.get(root, math.inf) <= self.room for root in roots)

    def grid(self, operand: Operand) -> Grid:
        """Return where an operand comes from."""
        if operand.producer is None:  # an input of the model
            return Grid(1, operand.shape[-2] if len(operand.shape) > 1 else 1, (1.0,), [[()]])
        return self.grids[base(operand.tensor)]

    def alias(self, index: int) -> None:
        """Give the results of an operation without engine their inputs' grids."""
        operation = self.plan.placements[index].operation
        inputs = [operand for operand in operation.inputs if operand.kind == "activation"]
        grids = [self.grid(operand) for operand in inputs]
        for output in operation.outputs:
            if len(inputs) == 1 and inputs[0].shape == output.shape and "[" not in inputs[0].tensor:
                self.grids[output.tensor] = grids[0]
            else:
                groups, rows = grouping(operation)
                everything = tuple(job for grid in grids for job in grid.everything())
                self.grids[output.tensor] = Grid(groups, rows, (1.0,), [[everything]] * groups)

    def prefetch_small(self, layer: int) -> None:
        """Load what the layer and all up to the next one need besides the layer's own weights: biases, norms."""
        placements = self.plan.placements
        for index in range(layer, len(placements)):
            operands = placements[index].operation.inputs
            if is_layer(placements[index]):
                if index > layer:
                    return
                operands = operands[2:]
            bits = sum(elements(o) * width(o, self.hardware) for o in operands if o.kind == "weight")
            if bits:
                self.actions[index]["sram", "read"] += bits
                self._small[index] = self._transfer(index, bits, [], "read", None)
                self.jobs.append(self._small[index])

    def small(self, index: int) -> list[Job]:
        """Return the load of an operation's small weights, if it has any."""
        if index not in self._small and index < self._first_layer:
            self.prefetch_small(index)
        return [self._small[index]] if index in self._small else []

    def lanes(self, index: int, count: float, after: Sequence[Job], tile: Tile, chained: Sequence[Job] = ()) -> Job:
        """Queue vector work: `count` scalar operations.

        chained: jobs of the same kernel on the same rows, whose results come row by row.
        """
        placement = self.plan.placements[index]
        engine = self.hardware.engines[placement.engine]
        operation = placement.operation
        if not isinstance(engine, Lanes) or operation.vector not in engine.does:
            raise InputError(
                f"the schedule places {operation.vector} of {operation.id} ({operation.module}) on "
                f"{placement.engine!r} of hardware {self.hardware.name!r}, which does not do it"
            )
        work = math.ceil(count / engine.lanes) * engine.interval
        read = written = 0.0
        share = count / max(operation.elements, 1)
        for operand in operation.inputs:
            if operand.kind == "activation" and base(operand.tensor) not in self.plan.forwarded:
                read += elements(operand) * width(operand, self.hardware) * share
        for output in operation.outputs[:1]:
            if output.tensor not in self.plan.forwarded:
                written += elements(output) * width(output, self.hardware) * share
        self.actions[index]["sram", "read"] += read
        self.actions[index]["lane", placement.engine, str(operation.vector)] += count
        duration = max(work, math.ceil(read / engine.port_bits), math.ceil(written / engine.port_bits))
        unit = placement.engine if len(engine.does) == 1 else f"{placement.engine} {operation.vector}"
        row = max(operand.shape[-1] for operand in (*operation.inputs, *operation.outputs) if operand.shape)
        behind = math.ceil(row / engine.lanes) * engine.interval
        job = Job(unit, index, work, duration, engine.latency, after, tile)
        job.streams = [(other, other.latency + behind) for other in chained]
        return self.add(job)
