"""A timeline that Perfetto and chrome://tracing open: one row for each engine and for the DRAM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrify.accelerator.result import Result


def trace(result: Result) -> dict[str, Any]:
    """Return the Trace Event form: complete events ("X"), times in us, the tile and what it waited for as arguments."""
    rows = {name: number for number, name in enumerate(result.queues, start=1)}
    scale = 1 / result.hardware.clock_mhz
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": f"{result.model} on {result.hardware.title}"}}
    ]
    for name, row in rows.items():
        events.append({"ph": "M", "pid": 1, "tid": row, "name": "thread_name", "args": {"name": name}})
        events.append({"ph": "M", "pid": 1, "tid": row, "name": "thread_sort_index", "args": {"sort_index": row}})
    for job in result.jobs:
        operation = result.placements[job.operation].operation
        arguments: dict[str, Any] = {"operation": operation.id, "cycles": job.duration}
        if job.tile is not None:
            arguments.update(zip(("group", "rows", "columns", "inner"), job.tile, strict=True))
        if job.waits:
            arguments["waited for"] = job.waits
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": rows[job.resource],
                "ts": job.start * scale,
                "dur": job.duration * scale,
                "name": f"{operation.module or result.model} {operation.step or operation.vector or ''}".strip(),
                "cat": operation.step or operation.kind,
                "args": arguments,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ns"}
