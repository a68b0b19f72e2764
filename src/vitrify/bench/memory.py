"""Peak memory of one call, by the method that each device can answer truthfully.

On CUDA: the caching allocator's peak above what was allocated before the call. On a CPU there is no such counter, so
two methods exist, and every result names its own:

- `resident`: a fresh process makes the inputs, warms up on them, and the growth of its peak resident set during one
  call counts: all that the call touches, from whatever allocator. Noise: about 1 MiB. `vitrify bench` shows this one.
- `allocated`: the running sum of torch's own allocations during the call, from the profiler. Exact and repeatable, in
  this process, but blind to scratch space that a library allocates for itself. Used inside whole models, per module.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vitrify.errors import VitrifyError

MIB = 2**20
METHODS = {
    "cuda": "peak of CUDA's caching allocator above its level before the call",
    "resident": "growth of the peak resident set during one call, in a fresh process, after a warm-up and malloc_trim",
    "allocated": "peak of the running sum of torch's allocations and frees during the call (profiler)",
}


def cuda_peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """Return MiB that `run` allocates on `device` at its worst moment, its result included."""
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def allocated_peak_mib(run: Callable[[], object]) -> float:
    """Return MiB that torch's CPU allocator holds for `run` at its worst moment, its result included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own starts and stops on stderr
    run()  # what is allocated once and cached (packed weights, thread pools) is not the call's own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    level = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak / MIB


def resident_peak_mib(run: Callable[[], object]) -> float:
    """Return MiB by which `run` raises this process's peak resident set; for a fresh process, on Linux or macOS."""
    run()
    _trim()
    before = _reset_peak()
    run()
    return (_peak_bytes() - before) / MIB


def resident_peak_of(module: str, request: Mapping[str, object], *, timeout_s: float = 600) -> float:
    """Run `python -m <module> <request as JSON>` in a fresh process, which prints its peak in MiB as its last line.

    Raises:
        VitrifyError: the process failed; the message ends with its last words.
    """
    command = [sys.executable, "-m", module, json.dumps(request)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise VitrifyError(f"the memory measurement {dict(request)} took more than {timeout_s:.0f} s") from None
    if done.returncode:
        raise VitrifyError(f"the memory measurement {dict(request)} failed: {done.stderr.strip()[-400:]}")
    return float(done.stdout.split()[-1])


def _trim() -> None:
    """Give the allocator's free pages back, so that the measured call cannot hide in what the warm-up left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> int:
    """Lower the peak to the present resident set where the kernel can (Linux); return the level in bytes."""
    with contextlib.suppress(OSError):  # may be forbidden, and macOS has none: then growth above the old peak is seen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _peak_bytes()


def _peak_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):  # unlike ru_maxrss, this one follows clear_refs
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
