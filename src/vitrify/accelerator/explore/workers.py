"""Who simulates: this process, a pool of processes, or a Ray cluster. Each is a function from designs to outcomes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vitrify import __version__
from vitrify.accelerator.explore.trials import QUANTITIES, Outcome
from vitrify.accelerator.hardware import Hardware
from vitrify.accelerator.simulate import Objective, simulate
from vitrify.cost.graph import Workload
from vitrify.errors import InputError, VitrifyError, optional

Changes = Mapping[str, Any]
"""A design as `Hardware.with_` takes it: values by place."""


@dataclass(frozen=True)
class Task:
    """What is the same for all designs, and sent to each worker once."""

    workload: Workload
    hardware: Hardware
    tiles_by: Objective


Run = Callable[[Sequence[Changes]], Iterator[tuple[int, Outcome]]]
"""Gives each design's number and outcome, in the order in which they are done."""


def evaluate(task: Task, changes: Changes) -> Outcome:
    """Simulate the workload on the hardware with these changes; whatever goes wrong is an outcome."""
    try:
        result = simulate(task.workload, task.hardware.with_(changes), objective=task.tiles_by)
        quantities = {name: measure(result) for name, measure in QUANTITIES.items()}
    except InputError as error:
        return Outcome(status="refused", reason=str(error))
    except Exception as error:  # A fault of the simulator at one design must not cost the thousand others.
        return Outcome(status="failed", reason=f"{type(error).__name__}: {error}")
    mapping = result.mapping
    tiles = f"{mapping.tile_kib:g} KiB, {mapping.order}" + ("" if mapping.limit is None else f", {mapping.limit} wide")
    return Outcome(status="done", quantities=quantities, tiles=tiles, notes=list(result.notes))


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def working(task: Task, workers: int | None, ray: str | None) -> Iterator[Run]:
    """Give the function that simulates: here, in several processes, or with `ray` on that cluster.

    workers: None for this process alone, or two for each core of the cluster, so that none waits for its next design
    """
    if ray is not None:
        with _cluster(task, workers, ray) as run:
            yield run
    elif workers in (None, 1):
        yield lambda designs: ((number, evaluate(task, changes)) for number, changes in enumerate(designs))
    else:
        with _processes(task, workers) as run:
            yield run


_TASK: Task


def _begin(task: Task) -> None:
    """Make a process of the pool ready."""
    global _TASK  # noqa: PLW0603  (a pool's initialiser has no other way to leave something behind)
    _TASK = task
    # Ctrl-C is for the process that hands out the work. If that one is killed, nobody else ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _evaluate_here(changes: Changes) -> Outcome:
    return evaluate(_TASK, changes)


@contextmanager
def _processes(task: Task, workers: int) -> Iterator[Run]:
    # The server imports PyTorch once, and every worker is a fork of it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _begin, (task,))

    def run(designs: Sequence[Changes]) -> Iterator[tuple[int, Outcome]]:
        futures: dict[Future[Outcome], int] = {}
        try:
            futures = {pool.submit(_evaluate_here, changes): number for number, changes in enumerate(designs)}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        except BrokenProcessPool:
            raise VitrifyError(
                "a worker was killed (out of memory?). What is finished is kept: the same command, perhaps with fewer "
                "workers, goes on"
            ) from None

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_attempt(address: str) -> Iterator[None]:
    """Let Ray try an address once, half a minute; by itself it tries a cluster that is gone for over ten."""
    patience = "RAY_gcs_server_port_wait_time_s"
    if address == "local" or patience in os.environ:
        yield
        return
    os.environ[patience] = "1"
    try:
        yield
    finally:
        del os.environ[patience]


@contextmanager
def _cluster(task: Task, workers: int | None, address: str) -> Iterator[Run]:
    with optional("ray", "ray", "a cluster"):
        import ray  # noqa: PLC0415  (an extra)
    ours = not ray.is_initialized()
    if ours:
        own: dict[str, Any] = {"num_cpus": workers or cores(), "include_dashboard": False} if address == "local" else {}
        try:
            with _one_attempt(address):
                ray.init(address=address, log_to_driver=False, logging_level="warning", **own)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"there is no Ray cluster at {address!r} ('local' starts one here): {error}") from error

    remote = ray.remote(evaluate)
    shared = ray.put(task)
    most = workers or 2 * int(ray.cluster_resources().get("CPU", 1))

    def run(designs: Sequence[Changes]) -> Iterator[tuple[int, Outcome]]:
        left = iter(enumerate(designs))
        pending: dict[Any, int] = {}
        try:
            while True:
                for number, changes in left:
                    pending[remote.remote(shared, changes)] = number
                    if len(pending) >= most:
                        break
                if not pending:
                    return
                for done in ray.wait(list(pending))[0]:
                    yield pending.pop(done), ray.get(done)
        except ray.exceptions.RayTaskError as error:
            # What goes wrong in a simulation is an outcome: this one did not begin.
            raise VitrifyError(
                f"the cluster's nodes need vitrify {__version__}, as this one has: {error.cause}"
            ) from error
        except ray.exceptions.RayError as error:
            raise VitrifyError(
                f"the cluster lost a design: {error}. What is finished is kept: the same command goes on"
            ) from error

    try:
        yield run
    finally:
        if ours:
            ray.shutdown()
