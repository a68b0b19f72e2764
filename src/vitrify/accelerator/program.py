"""A program: tiles of operations as jobs in the queues of engines and of the DRAM, and the clock that runs them.

Every resource (an engine with its SRAM port; the DRAM channel) has one queue and serves it in order. A job starts when
its resource is free and everything that it waits for is ready; so its start is a maximum of sums of durations, and a
program never ends later when a duration gets shorter: a faster memory cannot slow it down. One pass over the jobs, in
an order in which they can run, finds the same times as a clock that ticks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

DRAM = "dram"


class Tile(NamedTuple):
    """The part of an operation that a job does: ranges [from, to) in one group (a head of an image).

    Of a matmul: rows and columns of the output, and `inner`, of the sum. Of vector work: rows and columns of what it
    reads. Of a job that moves data: rows of the tensor that it names.
    """

    group: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    inner: tuple[int, int] = (0, 0)


@dataclass(slots=True, eq=False)
class Job:
    """A tile on a resource.

    resource      the engine's name, or "dram"
    operation     the index of its placement in the program
    work          cycles that it needs by itself; `duration` counts what its SRAM port adds
    latency       cycles after its end at which its result can be used
    after         jobs whose results it needs
    frees         jobs that must have ended, for it takes over their buffer
    streams       (job, cycles): vector work whose results it takes as they come, so many cycles behind
    tensor        the activation that a job on the DRAM moves
    start, end    set by `run`, in cycles
    waits         what it waited for last, if its resource was idle: "operand", "dram" or nothing
    """

    resource: str
    operation: int
    work: int
    duration: int
    latency: int
    after: Sequence[Job]
    tile: Tile | None = None
    frees: Sequence[Job] = ()
    streams: Sequence[tuple[Job, int]] = ()
    tensor: str = ""
    start: int = 0
    end: int = 0
    waits: str = ""

    @property
    def ready(self) -> int:
        """The cycle at which its result can be used."""
        return self.end + self.latency


@dataclass
class Queue:
    """What a resource did.

    busy      cycles in which it worked; port: cycles of these in which it only waited for its SRAM port
    idle      cycles between its first and its last job, by what it waited for: "operand", "dram"
    """

    busy: int = 0
    port: int = 0
    jobs: int = 0
    first: int = 0
    last: int = 0
    idle: dict[str, int] = field(default_factory=lambda: {"operand": 0, DRAM: 0})


def run(jobs: Sequence[Job]) -> tuple[int, dict[str, Queue]]:
    """Set the jobs' times and return the cycle at which the last result is ready, and what each resource did.

    jobs: in an order in which each comes after all that it waits for
    """
    free: dict[str, int] = {}
    queues: dict[str, Queue] = {}
    total = 0
    for job in jobs:
        ready, last, until = 0, None, 0
        for other in job.after:
            if other.end + other.latency > ready:
                ready, last = other.end + other.latency, other
        for other in job.frees:
            if other.end > ready:
                ready, last = other.end, other
        for other, behind in job.streams:
            if other.start + behind > ready:
                ready, last = other.start + behind, other
            until = max(until, other.end + behind)
        begin = free.get(job.resource)
        queue = queues.get(job.resource)
        if begin is None or queue is None:
            begin = ready
            queue = queues[job.resource] = Queue(first=ready)
        start = begin if begin > ready else ready
        if start > begin and last is not None:
            job.waits = DRAM if last.resource == DRAM else "operand"
            queue.idle[job.waits] += start - begin
        else:
            job.waits = ""
        job.start = start
        job.end = free[job.resource] = max(start + job.duration, until)
        queue.busy += job.duration
        queue.port += job.duration - job.work
        queue.jobs += 1
        queue.last = job.end
        total = max(total, job.end + job.latency)
    return total, queues
