"""A model with one block in place of each chain of equal ones: it is traced ten times, each in a tenth of the time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from vitrify.cost.explain.variants import meta_copy
from vitrify.cost.graph import Workload


@dataclass(frozen=True)
class Pruned:
    """A copy without weights, and how many blocks the one left of each chain stands for, by the chain's name."""

    model: nn.Module
    counts: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Pruned:
        """Prune every nn.Sequential and nn.ModuleList whose children are of one make."""
        copied, counts = meta_copy(model), {}
        for name, module in list(copied.named_modules()):
            chain = type(module) in (nn.Sequential, nn.ModuleList) and len(module) > 1
            if chain and len({repr(child) for child in module}) == 1:
                counts[name] = len(module)
                del module[1:]
        return cls(copied, counts)

    def times(self, module: str) -> int:
        """Return how many modules of the model the one with that name stands for."""
        found = 1
        for chain, count in self.counts.items():
            if module.startswith(f"{chain}."):
                found *= count
        return found

    def stands_for(self, part: Workload, whole: Workload) -> bool:
        """Say whether the pruned model's workload is the whole's: as many products, and element-wise operations."""
        products = sum(operation.macs * self.times(operation.module) for operation in part.operations)
        vector = sum(operation.elements * self.times(operation.module) for operation in part.operations)
        return products == whole.macs and vector == sum(operation.elements for operation in whole.operations)
