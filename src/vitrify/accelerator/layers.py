"""Layers with weights as jobs: tiles of the weights, of the rows and of the sum."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from vitrify.accelerator.grids import PORTIONS, Grid, cuts
from vitrify.accelerator.hardware import Hardware, Systolic
from vitrify.accelerator.lower import Lowering, Plan
from vitrify.accelerator.placement import Mapping, array_of, base, elements, is_layer, operand_bits, partial_bits, width
from vitrify.accelerator.program import DRAM, Job, Tile
from vitrify.accelerator.systolic import best
from vitrify.cost.graph import Operation
from vitrify.errors import InputError


class TileTooSmallError(InputError):
    """A layer does not fit into a mapping's tiles."""


class _Tiles(NamedTuple):
    """How a layer is cut: ranges of rows, of the sum, and strips: of columns, or of whole groups side by side.

    by_strips   all rows of a strip, then the next; else all strips for some rows, which stay in the buffers meanwhile
    again       weights are fetched for each chunk of rows: only one tile of them is kept
    """

    rows: list[tuple[int, int]]
    inner: list[tuple[int, int]]
    strips: list[tuple[int, int]]
    by_strips: bool

    @property
    def again(self) -> bool:
        return len(self.inner) > 1 or (not self.by_strips and len(self.strips) > 1)


def least_cycles(plan: Plan, mapping: Mapping) -> float:
    """Return what the busiest resource needs for the layers with weights alone: no program of theirs is faster."""
    busy: defaultdict[str, float] = defaultdict(float)
    for placement in plan.placements:
        operation = placement.operation
        if not is_layer(placement):
            continue
        array = array_of(placement, plan.hardware)
        right = operand_bits(operation, array, plan.hardware)[1]
        tiles = _cut(operation, array, plan.hardware, mapping, True)
        flows = (placement.dataflow,) if placement.dataflow else array.dataflows
        for (row, many), (part, often), (strip, times) in product(*map(_classes, tiles[:3])):
            columns, groups = (operation.n, strip) if operation.count > 1 else (strip, 1)
            cost = best((row, part, columns), array.rows, array.columns, flows, mapping.limit)
            busy[placement.engine] += cost.occupied * many * often * times * groups
        bits = operation.k * operation.n * operation.count * right * (len(tiles.rows) if tiles.again else 1)
        busy[DRAM] += bits / plan.hardware.dram_bits_per_cycle
    return max(busy.values(), default=0.0)


def _classes(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the lengths of ranges, and how often each occurs: all but the last are equal."""
    return list(Counter(high - low for low, high in ranges).items())


def _cut(operation: Operation, array: Systolic, hardware: Hardware, mapping: Mapping, stays: bool) -> _Tiles:
    """Cut weights, the left operand and partial sums so that each fits into a tile of its own.

    stays: the left operand is in the SRAM, so that partial sums have its buffers, too
    """
    tile = mapping.tile_kib * 8192
    left, right = operand_bits(operation, array, hardware)
    partial = partial_bits(operation, array, hardware)
    m, k, n = operation.m, operation.k, operation.n
    columns, inner, groups = n, k, 1
    # Strips are no narrower than the array, or than the part of it that is used.
    side = max(64, min(array.columns, mapping.limit or array.columns))
    if operation.count > 1:
        groups = min(operation.count, int(tile / (k * n * right)))
    else:
        columns = min(n, max(side, _rounded(tile / (k * right), side)))
        inner = min(k, _rounded(tile / (columns * right), 64))
    rows = 0.0
    parts = _even(k, inner, 64) if inner else []
    if parts and groups:
        inner = parts[0][1]
        sums, streamed = tile / (columns * groups * partial), tile / (inner * groups * left)
        rows = 3 * sums if stays and mapping.order == "strips" else min(sums, streamed)
    if rows < 1:
        raise TileTooSmallError(
            f"{operation.id} ({operation.module}), {m} x {k} x {n}, does not fit into tiles of {mapping.tile_kib:g} KiB"
        )
    strips = cuts(operation.count, groups) if operation.count > 1 else cuts(n, columns)
    by_strips = _Tiles(_even(m, rows), parts, strips, True)
    kept = 2 * tile / (k * groups * left)  # rows that the two buffers for activations hold whole
    if mapping.order == "strips" or kept < 1:
        return by_strips
    by_rows = _Tiles(_even(m, min(rows, kept)), parts, strips, False)
    weights, rest = k * n * operation.count * right, m * k * operation.count * left
    streams = len(by_strips.rows) * len(parts) > 1 and operation.count == 1
    first = weights * (len(by_strips.rows) if by_strips.again else 1) + rest * (len(strips) if streams else 1)
    return by_rows if weights * (len(by_rows.rows) if by_rows.again else 1) + rest < first else by_strips


def _even(total: int, most: float, step: int = 1) -> list[tuple[int, int]]:
    """Cut into as few equal ranges as `most` allows, of multiples of `step` if that is possible."""
    size = -(-total // -(-total // min(total, int(most))))
    rounded = -(-size // step) * step
    return cuts(total, rounded if rounded <= most else size)


def lower_layer(low: Lowering, index: int) -> None:
    """Add the jobs of a product with weights: a linear layer, or a convolution as the product that it lowers to."""
    _Layer(low, index).run()


class _Layer:
    def __init__(self, low: Lowering, index: int) -> None:
        self.low, self.index = low, index
        self.placement = low.plan.placements[index]
        self.operation = self.placement.operation
        self.array = array_of(self.placement, low.hardware)
        self.left, self.right = operand_bits(self.operation, self.array, low.hardware)
        self.partial = partial_bits(self.operation, self.array, low.hardware)
        self.stays = low.stays(base(self.operation.inputs[0].tensor))
        self.tiles = _cut(self.operation, self.array, low.hardware, low.mapping, self.stays)
        self.source = low.grid(self.operation.inputs[0])
        self.loaded: dict[Tile, Job] = {}
        self.recent: list[Job] = []
        self.waited: set[tuple[int, int]] = set()

    def run(self) -> None:
        op, low = self.operation, self.low
        low.prefetch_small(self.index)
        small = low.small(self.index)
        rows, inner, strips, by_strips = self.tiles
        tiles = [(s, r) for s in strips for r in rows] if by_strips else [(s, r) for r in rows for s in strips]
        done: dict[tuple[tuple[int, int], tuple[int, int]], tuple[Job, ...]] = {}
        weights: dict[Tile, Job] = {}
        for strip, row in tiles:
            job: Job | None = None
            for part in inner:
                key = Tile(0, (0, 0), strip, part)
                if key not in weights or self.tiles.again:
                    bits = (strip[1] - strip[0]) * (part[1] - part[0]) * self.right
                    bits *= op.n if op.count > 1 else 1
                    weights[key] = low.fetch(self.index, bits, key)
                after = [*small, weights[key], *self._left(strip, row, part)]
                low.next_tile()
                job = self._tile(strip, row, part, after, first=part == inner[0], last=part == inner[-1])
                low.end_tile(job)
            if job is not None:
                output = op.outputs[0]
                cells = (row[1] - row[0]) * (strip[1] - strip[0]) * (op.n if op.count > 1 else 1)
                done[strip, row] = low.publish(self.index, output.tensor, cells * width(output, low.hardware), job)
        self._make_grid(strips, rows, done, by_strips)

    def _make_grid(
        self,
        strips: Sequence[tuple[int, int]],
        rows: Sequence[tuple[int, int]],
        done: dict[tuple[tuple[int, int], tuple[int, int]], tuple[Job, ...]],
        by_strips: bool,
    ) -> None:
        columns = by_strips and len(strips) > 1
        outer, inner = (strips, rows) if columns else (rows, strips)
        total = outer[-1][1]
        edges, jobs = [], []
        for low_index, high_index in cuts(len(outer), 1, PORTIONS):
            edges.append(outer[high_index - 1][1] / total)
            keys = [(o, i) if columns else (i, o) for o in outer[low_index:high_index] for i in inner]
            jobs.append(tuple(job for key in keys for job in done[key]))
        grid = Grid(1, self.operation.m, edges, [jobs], columns)
        for output in self.operation.outputs:
            self.low.grids[output.tensor] = grid

    def _left(self, strip: tuple[int, int], row: tuple[int, int], part: tuple[int, int]) -> list[Job]:
        """Return what the rows of the left operand wait for, loading them if they did not stay in the SRAM."""
        op = self.operation
        jobs: list[Job] = []
        if row not in self.waited:  # queues are in order: what waits behind a job need not wait for the same again
            self.waited.add(row)
            low_end, high_end = row[0] / op.m, row[1] / op.m
            if op.kind == "conv":  # neighbouring pixels, too
                kernel = op.inputs[1].shape[-1] / op.inputs[0].shape[-2] if len(op.inputs[0].shape) > 2 else 0.0
                low_end, high_end = max(0.0, low_end - kernel), min(1.0, high_end + kernel)
            jobs = self.source.need(1, 0, op.m, low_end, high_end)
        if self.stays:
            return jobs
        key = Tile(0, row, strip if op.count > 1 else (0, 0), part)
        if key not in self.loaded:
            # A convolution's input is smaller than the left operand of its lowering.
            share = (row[1] - row[0]) / op.m * (part[1] - part[0]) / op.k
            share *= (strip[1] - strip[0]) / op.count if op.count > 1 else 1.0
            bits = min(elements(op.inputs[0]), op.m * op.k * op.count) * self.left * share
            job = self.low.load(self.index, bits, jobs, self.recent[:1])
            if self.tiles.by_strips:  # the buffers hold one tile; else they hold all parts of these rows
                self.loaded = {}
            self.loaded[key] = job
        return [self.loaded[key]]

    def _tile(
        self,
        strip: tuple[int, int],
        row: tuple[int, int],
        part: tuple[int, int],
        after: Sequence[Job],
        *,
        first: bool,
        last: bool,
    ) -> Job:
        op, low, array = self.operation, self.low, self.array
        times = strip[1] - strip[0] if op.count > 1 else 1
        columns = op.n if op.count > 1 else strip[1] - strip[0]
        shape = (row[1] - row[0], part[1] - part[0], columns)
        flows = (self.placement.dataflow,) if self.placement.dataflow else array.dataflows
        overlapped = low.plan.drain == "overlapped"
        cost = best(shape, array.rows, array.columns, flows, low.mapping.limit, not overlapped)
        work = times * (cost.occupied if overlapped else cost.every_fold)
        cells = shape[0] * columns * times
        sums = cost.partial * times // 2
        read = cost.left * times * self.left + cost.right * times * self.right
        read += (sums + (0 if first else cells)) * self.partial
        written = (sums + (0 if last else cells)) * self.partial
        actions = low.actions[self.index]
        actions["sram", "read"] += read
        actions["sram", "write"] += written
        actions["mac", self.placement.engine, op.primitive, str(self.left), str(self.right)] += math.prod(shape) * times
        duration = max(work, math.ceil(read / array.port_bits), math.ceil(written / array.port_bits))
        tile = Tile(0, row, strip, part)
        latency = cost.latency if overlapped else 0
        job = low.add(Job(self.placement.engine, self.index, work, duration, latency, after, tile))
        self.recent = [*self.recent[-1:], job]
        return job


def _rounded(size: float, step: int) -> int:
    """Round down to a multiple of `step`, if that leaves something."""
    whole = int(size)
    return whole // step * step if whole >= step else whole
