"""What counted actions cost, in pJ, and what engines and memories occupy, in mm2: from the tables of `cost/tables`.

Figures at 45 nm (operations) and 40 nm (registers) are scaled to the hardware's node. The text under each rule says
where it comes from; README.md lists what is left out (control, clock tree, leakage).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from vitrify.accelerator.hardware import Hardware, Lanes, Systolic
from vitrify.accelerator.placement import sum_bits
from vitrify.accelerator.sram import sram
from vitrify.cost.graph import Primitive
from vitrify.cost.tables import load, scale

# Eyeriss, normalised (ISCA 2016): a word on the NoC costs 2 where one of the global buffer costs 6.
_NOC_OF_SRAM = 2 / 6
# Measured on gate-level netlists of three libraries: a divider of 8 bits has 4.7 to 5.0 times an adder's cells.
_DIVIDER_OF_ADDER = 4.9


class Prices:
    """Prices at a hardware's node and widths."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._operations = load("horowitz45")
        self._registers = load("aladdin40")
        self._energy = scale(45, hardware.node_nm, "energy").value
        self._area = scale(45, hardware.node_nm, "area").value
        self._register_energy = scale(40, hardware.node_nm, "energy").value
        self._register_area = scale(40, hardware.node_nm, "area").value

    @cached_property
    def levels(self) -> Mapping[str, float]:
        """PJ a bit: "dram", "sram read", "sram write", "noc", "register"."""
        buffer = sram(self.hardware.sram_kib, 512)
        shrink = scale(28, self.hardware.node_nm, "energy").value if self.hardware.node_nm != 28 else 1.0
        read, write = buffer.read_pj_per_bit * shrink, buffer.write_pj_per_bit * shrink
        return {
            "dram": load("dram")[f"dram.{self.hardware.dram.energy}"].pj_per_bit,
            "sram read": read,
            "sram write": write,
            "noc": (read + write) / 2 * _NOC_OF_SRAM,
            "register": self._registers["access.register"].pj_per_bit * self._register_energy,
        }

    def product(self, primitive: Primitive, left: int, right: int) -> float:
        """Return pJ of one product and its accumulation, without the registers."""
        partial = sum_bits(primitive, left, right, self.hardware.numbers)
        energy = self._operations.at_width("energy", "add", partial).value
        if primitive == "multiply":
            # A multiplier of a x b bits has a b cells, as has a square one of their geometric mean.
            energy += self._operations.at_width("energy", "multiply", (left * right) ** 0.5).value
        elif primitive == "shift":
            energy += self._operations.at_width("energy", "shift", max(left, right)).value
        return energy * self._energy

    def registers(self, primitive: Primitive, left: int, right: int) -> float:
        """Return pJ of a PE's registers for one product.

        The streaming operand and the partial sum are read and written, what stays is read.
        """
        bits = 2 * left + right + 2 * sum_bits(primitive, left, right, self.hardware.numbers)
        return bits * self.levels["register"]

    def scalar(self, kind: str) -> float:
        """Return pJ of one scalar operation on a vector engine."""
        bits = self.hardware.numbers.vector_bits
        operation = {"mul": "multiply"}.get(kind, kind)
        return self._operations.at_width("energy", operation, bits).value * self._energy

    def areas(self) -> dict[str, float]:
        """Return mm2 of each engine and of the SRAM."""
        found = {name: self._engine(engine) for name, engine in self.hardware.engines.items()}
        shrink = scale(28, self.hardware.node_nm, "area").value if self.hardware.node_nm != 28 else 1.0
        found["sram"] = sram(self.hardware.sram_kib, 512).area_mm2 * shrink
        return found

    def _engine(self, engine: Systolic | Lanes) -> float:
        if isinstance(engine, Systolic):
            return engine.pes * self.pe(engine) * 1e-6
        return engine.lanes * sum(self._lane(kind) for kind in engine.does) * 1e-6

    def pe(self, array: Systolic) -> float:
        """Return um2 of one PE: the operators of its primitives, the accumulator, and its registers.

        Registers hold the streaming operand, what stays twice (the next one is loaded meanwhile), the partial sum, and
        a second one if sums can stay in place.
        """
        widest = (sum_bits(p, array.left_bits, array.right_bits, self.hardware.numbers) for p in array.primitives)
        partial = max(widest)
        cells = self._operations.at_width("area", "add", partial).value
        if "multiply" in array.primitives:
            cells += self._operations.at_width("area", "multiply", (array.left_bits * array.right_bits) ** 0.5).value
        if "shift" in array.primitives:
            cells += self._operations.at_width("area", "shift", max(array.left_bits, array.right_bits)).value
        bits = array.left_bits + 2 * array.right_bits + partial * (2 if array.in_place else 1)
        register = self._registers["area.register.bit"].value * self._register_area
        return cells * self._area + bits * register

    def _lane(self, kind: str) -> float:
        """Return um2 of one lane's unit for one kind of operation, its registers included.

        exp, erf, tanh and sqrt are as much larger than a multiplier as they cost more energy: no table has their area.
        """
        bits = self.hardware.numbers.vector_bits
        table = self._operations
        if kind in ("add", "compare"):
            cells = table.at_width("area", "add", bits).value
        elif kind == "mul":
            cells = table.at_width("area", "multiply", bits).value
        elif kind == "div":
            cells = table.at_width("area", "add", bits).value * _DIVIDER_OF_ADDER * bits / 8
        else:
            ratio = table.at_width("energy", kind, bits).value / table.at_width("energy", "multiply", bits).value
            cells = table.at_width("area", "multiply", bits).value * ratio
        register = self._registers["area.register.bit"].value * self._register_area
        return cells * self._area + 3 * bits * register
