"""Timing on a GPU: what its kernels take, not what Python takes to launch them.

One call of a short operator takes microseconds on the GPU and tens of them in Python. So calls are made in a row, from
a CUDA graph if they can be captured, and the GPU is kept busy until all of them are in its queue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vitrify.bench.registry import Contender
from vitrify.bench.timing import Timer, single_calls

ROW_MS = 1.0
"""Calls in a row take about this long: a thousand times the resolution of CUDA's events."""
MAX_CALLS = 128
SLEEP_CYCLES_PER_MS = 2_000_000
"""At 2 GHz, the highest clock of these GPUs: at a lower one the sleep is longer, which does no harm."""
GRAPH_LAUNCH_MS = 0.2
METHOD = (
    "calls in a row between two events, each on the next input, over their number, the GPU kept busy until all are "
    "queued; from a CUDA graph ('graph of N calls'), or launched one by one where they cannot be captured ('loop of N "
    "calls'); 'single calls' are synchronised and include their launches. The L2 cache is not flushed: inputs rotate, "
    "weights stay in it if they fit"
)


def calls_in_a_row(call_ms: float, inputs: int) -> int:
    """Return how many calls take about `ROW_MS`: a multiple of the number of inputs, so that each is used as often."""
    wanted = min(math.ceil(ROW_MS / max(call_ms, 1e-6)), MAX_CALLS)
    return math.ceil(wanted / inputs) * inputs


def timer(contender: Contender, inputs: Sequence[Any], device: torch.device) -> tuple[Timer, str]:
    """Return what times one contender on CUDA as its `timed` asks for, and how in words.

    A contender that was to be captured, and cannot be, is timed in a loop; the words then say why.
    """
    if contender.timed == "call":
        return single_calls(contender.run, inputs, device), "single calls"

    def row(calls: int) -> None:
        for index in range(calls):
            contender.run(inputs[index % len(inputs)])

    row(len(inputs))  # whatever is compiled, tuned or allocated at the first calls
    sample = 2 * len(inputs)
    launch_ms = _host_ms(lambda: row(sample), device) / sample
    calls = calls_in_a_row(_row_ms(lambda: row(sample), launch_ms * sample, device) / sample, len(inputs))
    why = ""
    if contender.timed == "graph":
        try:
            graph = _capture(lambda: row(calls), device)
        except RuntimeError as error:
            why = f" (not captured: {str(error).splitlines()[0][:100]})"
        else:
            return lambda turn: _row_ms(graph.replay, GRAPH_LAUNCH_MS, device) / calls, f"graph of {calls} calls"
    return lambda turn: _row_ms(lambda: row(calls), launch_ms * calls, device) / calls, f"loop of {calls} calls{why}"


def _host_ms(launch: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    launch()
    return (time.perf_counter() - begin) * 1e3


def _row_ms(launch: Callable[[], object], launch_ms: float, device: torch.device) -> float:
    """Return the GPU's milliseconds of what `launch` queues; it sleeps for twice the `launch_ms` of that before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(2 * launch_ms * SLEEP_CYCLES_PER_MS))  # type: ignore[no-untyped-call]
    start.record()
    launch()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))


def _capture(launch: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # libraries make their workspaces for a stream at its first call
        launch()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        launch()
    return graph
