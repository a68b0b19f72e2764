"""Loop orders, as rules for `tvm.s_tir.dlight`: it has none for products on a CPU, and those for GPUs we take over.

`Accumulate` takes every product (dense, batched, MatAdd, MatShift, convolution), `Spatial` what no other rule takes.
"""

from __future__ import annotations

from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import SBlockInfo, normalize_prim_func
from tvm.s_tir.dlight.cpu.base import CPUScheduleRule
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule
from tvm.target import Target

# A tile of 4 x 32 float32 sums: 16 registers of AVX2, 8 of AVX-512, with the rest free for what is loaded.
ROWS, COLUMNS = 4, 32
# Below this a vector does not pay.
NARROW = 4


class Accumulate(CPUScheduleRule):  # type: ignore[misc]
    """out[..., m, n] = sum over k of anything: a tile of sums stays in registers while k runs.

    Blocks before the sum whose name begins with "decode" are computed once per stripe of columns, not once per product;
    what follows the sum (bias, activation) is computed tile by tile.
    """

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        """Return the schedule, or None if `func` is not one sum with at least two output axes."""
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        schedule = s_tir.Schedule(func)
        blocks = normalize_prim_func(schedule)
        if blocks is None:
            return None
        sums = [block for block in blocks if not block.is_injective()]
        if len(sums) != 1 or _kinds(sums[0]).count("S") < 2 or _width(sums[0]) < 2:
            return None
        total = sums[0]
        place = blocks.index(total)
        decoders = [b for b in blocks[:place] if b.name.startswith("decode")]
        for block in [b for b in blocks[:place] if b not in decoders] + blocks[place + 1 : -1]:
            schedule.compute_inline(block.block_rv)
        after = blocks[-1].block_rv if place + 1 < len(blocks) else schedule.cache_write(total.block_rv, 0, "local")
        _tile(schedule, total, [b.block_rv for b in decoders], after)
        return schedule


def _tile(schedule: s_tir.Schedule, total: SBlockInfo, decoders: list[Any], after: Any) -> None:
    loops = schedule.get_loops(total.block_rv)
    spatial = [loop for loop, kind in zip(loops, _kinds(total), strict=True) if kind == "S"]
    summed = [loop for loop, kind in zip(loops, _kinds(total), strict=True) if kind == "R"]
    *batch, m, n = spatial
    outer_m, inner_m = schedule.split(m, [None, ROWS])
    outer_n, inner_n = schedule.split(n, [None, min(COLUMNS, _width(total))])
    schedule.reorder(*batch, outer_n, outer_m, *summed, inner_m, inner_n)
    stripe = schedule.fuse(*batch, outer_n)
    schedule.parallel(stripe)
    for decoder in decoders:
        schedule.compute_at(decoder, stripe)
        schedule.vectorize(schedule.get_loops(decoder)[-1])
    schedule.reverse_compute_at(after, outer_m)
    schedule.vectorize(schedule.get_loops(after)[-1])
    schedule.unroll(inner_m)
    schedule.vectorize(inner_n)
    schedule.decompose_reduction(total.block_rv, summed[0])


class Spatial(CPUScheduleRule):  # type: ignore[misc]
    """Element by element: outer axes over the cores, the last one in vectors."""

    def apply(self, func: tirx.PrimFunc, target: Target, _: bool) -> s_tir.Schedule | None:
        """Return the schedule, or None if a block of `func` is neither elementwise nor a plain reduction."""
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        schedule = s_tir.Schedule(func)
        blocks = dlight.try_inline(schedule, normalize_prim_func(schedule) or [])
        for block in blocks:
            kinds = _kinds(block)
            loops = schedule.get_loops(block.block_rv)
            outer = len(kinds) - len(kinds.lstrip("S"))
            if block.is_injective():
                outer = len(loops) - 1
                if _width(block) >= NARROW:
                    _, inner = schedule.split(loops[-1], [None, min(COLUMNS, _width(block))])
                    schedule.vectorize(inner)
            if outer > 0:
                schedule.parallel(schedule.fuse(*loops[:outer]))
        return schedule


class IntegerSums(GPUScheduleRule):  # type: ignore[misc]
    """Sums of integers on a GPU, in plain loops: dlight would give them to tensor cores, which only multiply."""

    def apply(self, func: tirx.PrimFunc, target: Target, tunable: bool) -> s_tir.Schedule | None:
        """Return the schedule, or None if `func` sums no integers."""
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        schedule = s_tir.Schedule(func)
        sums = [block for block in normalize_prim_func(schedule) or [] if not block.is_injective()]
        written = [str(schedule.get(block.block_rv).writes[0].source.dtype) for block in sums]
        if not any(dtype.startswith("int") for dtype in written):
            return None
        return dlight.gpu.Fallback().apply(func, target, tunable)


def rules(target: Target) -> list[dlight.ScheduleRule]:
    """Return the rules for a target, in the order in which they are asked."""
    if target.kind.name == "llvm":
        return [Accumulate(), dlight.cpu.Reduction(), Spatial()]
    gpu = dlight.gpu
    return [IntegerSums(), gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]


def _kinds(block: SBlockInfo) -> str:
    kinds: str = block.dom_kind()
    return kinds


def _width(block: SBlockInfo) -> int:
    """Return the length of the last output axis."""
    last = [axis for axis in block.iters if axis.kind == "S"][-1]
    return int(last.dom)
