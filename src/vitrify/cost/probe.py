"""What this machine reaches, measured in seconds: large matmuls, large copies, and calls that do next to nothing."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitrify.cost.target_file import DTYPES, FLOATS

_TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
_CALLS = 500


def matmul_flop_s(device: torch.device, dtype: torch.dtype, size: int | None = None, tries: int = 30) -> float:
    """Return the operations (a multiply-add is two) a second of a large square matmul, as the best of `tries`.

    int8 sums in int32; float8_e4m3fn has scales of one. Raises RuntimeError where torch has no such kernel.
    """
    # On a CPU a few milliseconds: calls that short find a moment in which nothing else runs.
    size = size or (8192 if device.type == "cuda" else 512)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    run: Callable[[], object] = partial(torch.matmul, left, right)
    if dtype == torch.int8:
        run = partial(torch._int_mm, left, right.t())
    elif dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=device)
        run = partial(torch._scaled_mm, left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return 2 * size**3 / best_s(run, device, tries)


def copy_bytes_s(device: torch.device, size: int | None = None, *, overhead_s: float = 0.0, tries: int = 30) -> float:
    """Return the bytes a second, read plus written, of copying `size` floats; by default far more than any cache."""
    source = torch.randn(size or (2**29 if device.type == "cuda" else 2**24), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (best_s(lambda: target.copy_(source), device, tries) - overhead_s)


def best_s(run: Callable[[], object], device: torch.device, tries: int = 30) -> float:
    """Return the least seconds of one call after a first one that warms up: a probe can only be too slow."""
    best = float("inf")
    for attempt in range(tries + 1):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        if attempt:
            best = min(best, time.perf_counter() - begin)
    return best


def measure(device: torch.device, *, title: str, machine: str) -> dict[str, Any]:
    """Return this machine, with the threads that torch uses now, as the content of a target file.

    It extends "cpu" or "_gpu", which have what a short probe cannot find out: what part of its peaks each kind of
    kernel reaches. title, machine: as in the file.
    """
    on_gpu = device.type == "cuda"
    call_s = _call_s(device)
    # CPUs without such arithmetic take seconds for one such matmul, and nobody runs models that way.
    formats = [name for name in DTYPES if on_gpu or name not in ("fp16", "fp8")]
    peaks = {name: rate for name in formats if (rate := _peak(device, name))}
    sections: dict[str, dict[str, Any]] = {
        "peak": {
            name: _entry(rate / 1e9, "GFLOP/s" if name in FLOATS else "GOP/s", "matmul") for name, rate in peaks.items()
        },
        "vector": {
            "arithmetic": _entry(_element_rate(device, torch.add, call_s) / 1e9, "GOP/s", "vector"),
            "special": _entry(
                _element_rate(device, lambda x, _, out: torch.exp(x, out=out), call_s) / 1e9, "GOP/s", "vector"
            ),
        },
        "bandwidth": {
            "memory": _entry(copy_bytes_s(device) / 1e9, "GB/s", "copy"),
            "cache": _entry(copy_bytes_s(device, 2**18, overhead_s=call_s) / 1e9, "GB/s", "copy"),
        },
        "launch": {"eager": _entry(call_s * 1e6, "us", "call")},
        "memory": {name: _entry(value, "MB", "system") for name, value in _memory(device).items()},
    }
    if on_gpu:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        sections["units"] = {"processors": _entry(processors, "count", "system")}
    else:
        sections["units"] = {"threads": _entry(torch.get_num_threads(), "count", "system")}
    return {
        "title": title,
        "extends": "_gpu" if on_gpu else "cpu",
        "machine": machine,
        "dtype": "bf16" if on_gpu else "fp32",
        "sources": dict(_SOURCES),
        **sections,
    }


_SOURCES = {
    "matmul": "vitrify probe: a square matmul of 512 rows (GPU: 8192), the best of 30",
    "vector": "vitrify probe: add and exp of 32,768 floats (GPU: 16 million) less a call's overhead, the best of 100",
    "copy": "vitrify probe: a copy of 64 MiB (GPU: 2 GiB), for the cache 1 MiB, read plus written, the best of 30",
    "call": "vitrify probe: the addition of two single numbers, median",
    "system": "as the operating system or the driver says",
}


def _peak(device: torch.device, name: str) -> float | None:
    try:
        return matmul_flop_s(device, _TORCH_DTYPES[name]) if name in _TORCH_DTYPES else None
    except RuntimeError:  # this build of torch has no such kernel for the device
        return None


def _call_s(device: torch.device) -> float:
    x = torch.ones(1, device=device)
    rounds = []
    for _ in range(9):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(_CALLS):
            torch.add(x, x)
        _wait(device)
        rounds.append((time.perf_counter() - begin) / _CALLS)
    return statistics.median(rounds)


def _element_rate(device: torch.device, run: Callable[..., object], call_s: float) -> float:
    x = torch.randn(2**24 if device.type == "cuda" else 2**15, device=device)
    out = torch.empty_like(x)
    return x.numel() / max(best_s(lambda: run(x, x, out=out), device, 100) - call_s, 1e-9)


def _memory(device: torch.device) -> Mapping[str, float]:
    """Return MB of memory and of the last cache, as far as the system says."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"size": properties.total_memory / 1e6, "cache": properties.L2_cache_size / 1e6}
    found = {"size": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6}
    try:
        levels = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
        found["cache"] = int(levels[-1].read_text("ascii").strip().removesuffix("K")) * 1024 / 1e6
    except (OSError, ValueError, IndexError):
        pass  # the base target's
    return found


def _entry(value: float, unit: str, source: str) -> dict[str, Any]:
    return {"value": float(f"{value:.4g}"), "unit": unit, "source": source, "status": "measured"}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
