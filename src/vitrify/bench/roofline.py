"""The floor beside each measurement: no code on this machine can be faster than its bytes and its arithmetic allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """What one call has to do at least: floating-point operations (a multiply-add is two), and bytes to move."""

    flops: int
    bytes_moved: int


@dataclass(frozen=True)
class Roofline:
    """What this machine reaches in two probes: a large copy (GB/s, read plus written) and a large matmul (GFLOP/s)."""

    bandwidth_gb_s: float
    peak_gflop_s: float
    dtype: str

    def floor_ms(self, cost: Cost) -> float:
        """Return the milliseconds that `cost` takes at least: for its bytes or its arithmetic, whichever is slower."""
        return max(cost.bytes_moved / self.bandwidth_gb_s, cost.flops / self.peak_gflop_s) * 1e-6

    def best(self, other: Roofline) -> Roofline:
        """Return the higher of both limits: a probe can only be too slow."""
        return Roofline(
            max(self.bandwidth_gb_s, other.bandwidth_gb_s), max(self.peak_gflop_s, other.peak_gflop_s), self.dtype
        )


def probe(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure the two limits in about a second, as the best of a few tries, with the threads torch uses now."""
    on_gpu = device.type == "cuda"
    source = torch.randn(2**29 if on_gpu else 2**25, device=device)  # 2 GiB or 128 MiB: far beyond any cache
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), device)
    size = 8192 if on_gpu else 1024
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    matmul_s = _best_s(lambda: left @ right, device)
    return Roofline(
        bandwidth_gb_s=2 * source.nbytes / copy_s / 1e9,
        peak_gflop_s=2 * size**3 / matmul_s / 1e9,
        dtype=str(dtype).removeprefix("torch."),
    )


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
