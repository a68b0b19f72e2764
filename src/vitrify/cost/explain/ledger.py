"""Adds up what a model costs from workloads of its pruned copy, by group of modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vitrify.cost.energy import energy
from vitrify.cost.explain.groups import Group, Layout
from vitrify.cost.explain.prune import Pruned
from vitrify.cost.explain.variants import in_dtype, meta_copy
from vitrify.cost.fusion import Fusion, bytes_of
from vitrify.cost.graph import Workload
from vitrify.cost.latency import Latency, latency, weights_of
from vitrify.cost.target_file import DTYPES, Target
from vitrify.cost.workload import workload
from vitrify.errors import InputError


@dataclass(frozen=True)
class Cost:
    """Seconds and picojoules by group, and how the former came about."""

    latency: Latency
    time: Mapping[Group, float]
    energy: Mapping[Group, float]

    @property
    def seconds(self) -> float:
        """Of the whole model."""
        return sum(self.time.values())

    @property
    def energy_pj(self) -> float:
        """Of the whole model."""
        return sum(self.energy.values())


@dataclass(frozen=True)
class Ledger:
    """Adds up the costs of the whole model from workloads of its pruned copy, by group.

    graph   the pruned copy's workload, as it is
    times   (workload, 8-bit format) -> its latency on the target
    """

    part: Pruned
    layout: Layout
    graph: Workload
    size: tuple[int, int, int]
    batch_size: int
    times: Callable[[Workload, str], Latency]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        whole: Workload,
        size: tuple[int, int, int],
        batch_size: int,
        machine: Target,
        dtype: str,
        fusion: Fusion | None,
        measured: str | Path | None,
    ) -> Ledger:
        """Prune the model, unless that would change what it does; `whole` is its workload."""
        part = Pruned.of(model)
        try:
            graph: Workload | None = workload(part.model, size, batch_size)
        except InputError:  # it asks for blocks that are gone
            graph = None
        if graph is None or not part.stands_for(graph, whole):
            part, graph = Pruned(meta_copy(model), {}), whole

        def times(graph: Workload, eight_bit: str) -> Latency:
            bits = DTYPES.get(dtype, 32)
            weights = weights_of(graph).values()
            weight_bytes = sum(bytes_of(operand, bits) * part.times(operand.tensor) for operand in weights)
            return latency(
                graph,
                machine,
                dtype=dtype,
                fusion=fusion,
                eight_bit=eight_bit,
                measured=measured,
                weight_bytes=weight_bytes,
            )

        return cls(part, Layout.of(part.model), graph, size, batch_size, times)

    def seconds(self, graph: Workload, eight_bit: str = "int8") -> float:
        """Return the seconds of the whole model."""
        operations = self.times(graph, eight_bit).operations
        return sum(operation.seconds * self.part.times(operation.module) for operation in operations)

    def by_group(self, graph: Workload, eight_bit: str) -> tuple[Latency, Mapping[Group, float]]:
        """Return the latency of the part, and the seconds of the whole model by group."""
        groups, found = self.layout.groups(graph), self.times(graph, eight_bit)
        time: dict[Group, float] = defaultdict(float)
        for operation in found.operations:
            time[groups[operation.id]] += operation.seconds * self.part.times(operation.module)
        return found, time

    def cost(self, graph: Workload, eight_bit: str = "int8") -> Cost:
        """Return time and energy by group."""
        groups, (found, time) = self.layout.groups(graph), self.by_group(graph, eight_bit)
        spent: dict[Group, float] = defaultdict(float)
        for part in energy(in_dtype(graph, DTYPES[found.dtype])).operations:
            spent[groups[part.id]] += part.split.total_pj * self.part.times(part.module)
        return Cost(found, time, spent)
