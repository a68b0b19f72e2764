"""The floor beside each measurement: no code on this machine can be faster than its bytes and its arithmetic allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch


@dataclass(frozen=True)
class Cost:
    """What one call has to do at least: operations (a multiply-add is two), and bytes to move.

    `narrow`: how many of `flops` are not in the benchmark's own dtype, by the name of theirs ("bfloat16", "int8").
    """

    flops: int
    bytes_moved: int
    narrow: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Roofline:
    """What this machine reaches in a large copy (GB/s, read plus written) and in large matmuls (GFLOP/s or Gop/s).

    `peak_gflop_s` is the rate in `dtype`, the benchmark's own; `narrow_gflop_s` those in other dtypes, by name.
    """

    bandwidth_gb_s: float
    peak_gflop_s: float
    dtype: str
    narrow_gflop_s: Mapping[str, float] = field(default_factory=dict)

    def floor_ms(self, cost: Cost) -> float:
        """Return the milliseconds that `cost` takes at least: for its bytes or its arithmetic, whichever is slower."""
        arithmetic = (cost.flops - sum(cost.narrow.values())) / self.peak_gflop_s
        arithmetic += sum(flops / self.narrow_gflop_s[name] for name, flops in cost.narrow.items())
        return max(cost.bytes_moved / self.bandwidth_gb_s, arithmetic) * 1e-6

    def best(self, other: Roofline) -> Roofline:
        """Return the higher of both limits: a probe can only be too slow."""
        return Roofline(
            max(self.bandwidth_gb_s, other.bandwidth_gb_s),
            max(self.peak_gflop_s, other.peak_gflop_s),
            self.dtype,
            {name: max(rate, other.narrow_gflop_s[name]) for name, rate in self.narrow_gflop_s.items()},
        )


def probe(device: torch.device, dtype: torch.dtype, narrow: Collection[str] = ()) -> Roofline:
    """Measure the limits in about a second, as the best of a few tries, with the threads torch uses now.

    `narrow`: names of other dtypes whose rate is wanted: bfloat16, float16, int8 or float8_e4m3fn.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn(2**29 if on_gpu else 2**25, device=device)  # 2 GiB or 128 MiB: far beyond any cache
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device)
    return Roofline(
        bandwidth_gb_s=2 * source.nbytes / copy_s / 1e9,
        peak_gflop_s=_matmul_gflop_s(device, dtype),
        dtype=str(dtype).removeprefix("torch."),
        narrow_gflop_s={name: _matmul_gflop_s(device, getattr(torch, name)) for name in sorted(narrow)},
    )


def _matmul_gflop_s(device: torch.device, dtype: torch.dtype) -> float:
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    run: Callable[[], object] = partial(torch.matmul, left, right)
    if dtype == torch.int8:
        run = partial(torch._int_mm, left, right.t())
    elif dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        run = partial(torch._scaled_mm, left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return 2 * size**3 / _best_s(run, device) / 1e9


def _best_s(run: Callable[[], object], device: torch.device, tries: int = 8) -> float:
    best = float("inf")
    for attempt in range(tries + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if attempt:  # the first warms up
            best = min(best, time.perf_counter() - begin)
    return best
