"""What a product, a sum and an access cost at given widths, under either preset, and the contenders compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vitrify.cost.eyeriss import TERMS, Terms
from vitrify.cost.graph import Operation, Primitive
from vitrify.cost.tables import Table, load
from vitrify.errors import InputError

Section = Literal["energy", "area"]

# Widths at which a number is floating-point. The width alone does not tell bf16 from fp16: bf16 is what is compared.
_FLOATS = {32: "fp32", 16: "bf16", 8: "fp8"}
_LEVELS = ("dram", "sram", "noc", "noc_psum", "register", "register_weight")
# The authors store all data of a shift layer in (16 + 5) // 2 bits.
_THEIR_SHIFT_BITS = 10


@dataclass(frozen=True)
class Numbers:
    """Widths of the left and right operands, of partial sums, and of results as stored; floating-point or integer."""

    left: int
    right: int
    psum: int
    out: int
    floating: bool

    @property
    def widest(self) -> int:
        """The wider operand: what a shift shifts, and the format that a floating-point product is made in."""
        return max(self.left, self.right)


@dataclass(frozen=True)
class Contender:
    """A way to compute a matmul: its primitive, in these numbers."""

    primitive: Primitive
    numbers: Numbers


def _uniform(primitive: Primitive, bits: int, floating: bool = False) -> Contender:
    # Sums of 32 bits in every format: floating-point for floating-point products, else integers.
    return Contender(primitive, Numbers(bits, bits, 32, bits, floating))


CONTENDERS: Mapping[str, Contender] = {
    "FP32 multiply": _uniform("multiply", 32, floating=True),
    "BF16 multiply": _uniform("multiply", 16, floating=True),
    "FP8 multiply": _uniform("multiply", 8, floating=True),
    "INT8 multiply": _uniform("multiply", 8),
    "INT32 shift": _uniform("shift", 32),
    "INT16 shift": _uniform("shift", 16),
    "INT8 shift": _uniform("shift", 8),
    "INT32 add": _uniform("add", 32),
    "INT16 add": _uniform("add", 16),
    "INT8 add": _uniform("add", 8),
}


@dataclass(frozen=True)
class Charge:
    """Prices in pJ: of each kind of access to a word, and of one product with its accumulation."""

    access: Terms
    operation_pj: float


@dataclass(frozen=True)
class Prices:
    """The tables in use: `operations`, and pJ a bit moved at each level."""

    operations: Table
    per_bit: Mapping[str, float]

    @classmethod
    def from_tables(cls, unit_costs: str, dram: str | None) -> Prices:
        """Read the operations' table; accesses that it does not price are eyeriss_shiftaddvit's.

        `dram` names an entry of dram.yaml in place of either. Raises InputError for unknown names and faulty files.
        """
        operations, accesses = load(unit_costs), load("eyeriss_shiftaddvit")
        keys = [f"access.{level}" for level in _LEVELS]
        entries = {key: operations.entries.get(key) or accesses[key] for key in keys}
        if dram is not None:
            entries["access.dram"] = load("dram")[f"dram.{dram}"]
        return cls(operations, {level: entries[f"access.{level}"].pj_per_bit for level in _LEVELS})

    def product(self, section: Section, contender: Contender) -> float:
        """Return pJ or um2 of one product without its accumulation; adding has no other work than that: 0."""
        numbers = contender.numbers
        if contender.primitive == "add":
            return 0.0
        if contender.primitive == "shift":
            return self.operations.at_width(section, "shift", numbers.widest).value
        if numbers.floating:
            return self.scalar(section, "multiply", numbers.widest, floating=True)
        # A multiplier of a x b bits has a b cells, as has a square one of their geometric mean.
        return self.operations.at_width(section, "multiply", math.sqrt(numbers.left * numbers.right)).value

    def accumulation(self, section: Section, contender: Contender) -> float:
        """Return pJ or um2 of adding one product to a partial sum of its width."""
        return self.scalar(section, "add", contender.numbers.psum, contender.numbers.floating)

    def scalar(self, section: Section, kind: str, bits: int, floating: bool) -> float:
        """Return pJ or um2 of one of the table's operations; InputError for a float of other than 32, 16 or 8 bits."""
        if not floating:
            return self.operations.at_width(section, kind, bits).value
        if bits not in _FLOATS:
            raise InputError(f"no floating-point format of {bits} bits has a price: 32, 16 and 8 have")
        return self.operations[f"{section}.{kind}.{_FLOATS[bits]}"].value


def numbers_of(operation: Operation) -> Numbers:
    """Return the numbers that an operation works in: integers, unless an operand has 16 bits or more."""
    left, right, psum = operation.bits
    out = operation.outputs[0].bits if operation.outputs else left
    return Numbers(left, right, psum, out, floating=max(left, right) >= 16)


def like_for_like(prices: Prices, contender: Contender) -> Charge:
    """Charge every access and every accumulation at its real width."""
    numbers, per_bit = contender.numbers, prices.per_bit
    access = Terms(
        dram_in=per_bit["dram"] * numbers.left,
        dram_weight=per_bit["dram"] * numbers.right,
        dram_out=per_bit["dram"] * numbers.out,
        sram_in=per_bit["sram"] * numbers.left,
        sram_out=per_bit["sram"] * numbers.psum,
        noc_in=per_bit["noc"] * numbers.left,
        noc_weight=per_bit["noc"] * numbers.right,
        noc_psum=per_bit["noc_psum"] * numbers.psum,
        register_in=per_bit["register"] * numbers.left,
        register_weight=per_bit["register_weight"] * numbers.right,
        register_out=per_bit["register"] * numbers.psum,
    )
    return Charge(access, prices.product("energy", contender) + prices.accumulation("energy", contender))


def as_published(prices: Prices, contender: Contender) -> Charge:
    """Charge all data, partial sums too, at the wider operand's width, and the product without its accumulation."""
    numbers = contender.numbers
    bits = numbers.widest
    narrowed = Contender(contender.primitive, Numbers(bits, bits, bits, bits, numbers.floating))
    if contender.primitive == "add":
        operation_pj = prices.accumulation("energy", narrowed)
    else:
        operation_pj = prices.product("energy", narrowed)
    return Charge(like_for_like(prices, narrowed).access, operation_pj)


def as_the_authors_built(prices: Prices, primitive: Primitive) -> Charge:
    """Charge a layer as the authors do, whatever its widths: shifts move 10-bit data, adds pay the PEs alone."""
    if primitive == "shift":
        moved = as_published(prices, _uniform("shift", _THEIR_SHIFT_BITS)).access
        return Charge(moved, as_published(prices, CONTENDERS["INT32 shift"]).operation_pj)
    if primitive == "multiply":
        return as_published(prices, CONTENDERS["FP32 multiply"])
    full = as_published(prices, _uniform("add", 32, floating=True))
    inside = {
        name: getattr(full.access, name) for name in ("noc_psum", "register_in", "register_weight", "register_out")
    }
    return Charge(Terms(**{**dict.fromkeys(TERMS, 0.0), **inside}), full.operation_pj)
