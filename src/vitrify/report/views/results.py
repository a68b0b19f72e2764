"""What the demo of novel views found: plain data for its page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrify.bench.machine import Machine
from vitrify.nvs import Scene
from vitrify.nvs.evaluate import Record
from vitrify.nvs.evaluate import summary as means


@dataclass(frozen=True)
class Cost:
    """What one picture costs: products by primitive, energy on a modelled machine in mJ, and the weights in bytes."""

    multiply: int
    shift: int
    add: int
    energy_mj: float
    weight_bytes: int


@dataclass(frozen=True)
class Results:
    """What the demo found.

    records   of each picture, see `nvs.evaluate.evaluate`; their pictures are in `pictures`
    recipes   model -> what it was converted by; "none" for those that were not
    costs     model -> Cost of one picture
    routing   model -> by mixture, (H, W, points) bool: the points of the first view that multiply
    """

    records: list[Record]
    pictures: Path
    recipes: dict[str, str]
    costs: dict[str, Cost]
    routing: dict[str, dict[str, Tensor]]
    sources: int
    scenes: list[Scene]
    machine: Machine

    @property
    def models(self) -> list[str]:
        """The models' names, in the order in which they are shown."""
        return list(self.recipes)

    @property
    def reference(self) -> str | None:
        """The model that the others are compared with: the first that was not converted."""
        return next((name for name, recipe in self.recipes.items() if recipe == "none"), None)

    def numbers(self) -> dict[str, Any]:
        """Return what is measured, as JSON values."""
        return {
            "machine": str(self.machine),
            "sources": self.sources,
            "summary": means(self.records),
            "recipes": self.recipes,
            "costs": {name: asdict(cost) for name, cost in self.costs.items()},
            "multiplied": {
                model: {name: each.float().mean().item() for name, each in maps.items()}
                for model, maps in self.routing.items()
            },
            "views": self.records,
        }
