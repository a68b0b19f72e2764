"""How a workload is charged: ShiftAddViT's accounting as it was published, and one that is like for like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vitrify.cost.charges import (
    CONTENDERS,
    Charge,
    Contender,
    Prices,
    as_published,
    as_the_authors_built,
    like_for_like,
    numbers_of,
)
from vitrify.cost.eyeriss import Machine, Rule, Terms, Tiling, search
from vitrify.cost.graph import Operation, Primitive
from vitrify.cost.layers import layer_of, lowered, stacked
from vitrify.cost.split import Split
from vitrify.errors import InputError


@dataclass(frozen=True)
class Preset:
    """How a workload is charged.

    built        the charge of an operation as it stands in the workload
    contender    the charge of a matmul made of another primitive, in other numbers
    rule         which tiling is chosen
    stack        whether equal layers (heads, images, groups) are one layer of more rows
    vector       whether element-wise work is charged
    """

    built: Callable[[Prices, Operation], Charge]
    contender: Callable[[Prices, Contender], Charge]
    rule: Rule
    stack: bool
    vector: bool


PRESETS: Mapping[str, Preset] = {
    "like_for_like": Preset(
        built=lambda prices, operation: like_for_like(prices, contender_of(operation)),
        contender=like_for_like,
        rule="least_energy",
        stack=False,
        vector=True,
    ),
    "as_published": Preset(
        built=lambda prices, operation: as_the_authors_built(prices, operation.primitive),
        contender=as_published,
        rule="balanced",
        stack=True,
        vector=False,
    ),
}


def contender_of(operation: Operation, primitive: Primitive | None = None) -> Contender:
    """Return an operation's own primitive, or another, in the numbers that it works in."""
    return Contender(primitive or operation.primitive, numbers_of(operation))


@dataclass(frozen=True)
class Model:
    """A machine, the way it is charged, and the prices."""

    machine: Machine
    preset: Preset
    prices: Prices

    def built(self, operation: Operation) -> tuple[Split, Tiling | None]:
        """Return the energy of a matmul or convolution as it stands in the workload, and the tiling of its layers.

        Raises InputError naming the operation if its widths have no price.
        """
        if min(operation.bits) < 1:
            raise InputError(
                f"operation {operation.id} ({operation.module}): bits must be at least 1, not {operation.bits}"
            )
        try:
            charge = self.preset.built(self.prices, operation)
        except InputError as error:
            raise InputError(f"operation {operation.id} ({operation.module}): {error}") from error
        return self._charged(operation, charge)

    def alternatives(self, operation: Operation) -> dict[str, float]:
        """Return the energy in pJ of a matmul with each contender, and multiplied at its own widths."""
        ways = {"as built, multiplied": contender_of(operation, "multiply"), **CONTENDERS}
        charges = {name: self.preset.contender(self.prices, way) for name, way in ways.items()}
        return {name: self._charged(operation, charge)[0].total_pj for name, charge in charges.items()}

    def area(self, contender: Contender) -> float:
        """Return um2 of one PE's operation unit: its product and its accumulation."""
        return self.prices.product("area", contender) + self.prices.accumulation("area", contender)

    def _charged(self, operation: Operation, charge: Charge) -> tuple[Split, Tiling | None]:
        if not operation.macs:
            return Split(), None
        layers, count = [layer_of(operation), lowered(operation)], operation.count
        if self.preset.stack:
            layers, count = [stacked(layer, count) for layer in layers], 1
        found = (search(layer, charge.access, charge.operation_pj, self.machine, self.preset.rule) for layer in layers)
        # A wide kernel or a long row may fit no tiling; a matmul always fits one.
        best = next(best for best in found if best is not None)
        return _split(best.accesses, charge, operation.macs // count) * count, best.tiling


def _split(accesses: Terms, charge: Charge, products: int) -> Split:
    price = charge.access

    def spent(level: str) -> float:
        terms = [name for name in vars(price) if name.startswith(f"{level}_")]
        return float(sum(getattr(accesses, name) * getattr(price, name) for name in terms))

    return Split(
        compute=products * charge.operation_pj,
        **{level: spent(level) for level in ("register", "noc", "sram", "dram")},
    )
