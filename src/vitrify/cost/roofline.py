"""How long one kernel takes on a target: max(arithmetic, bytes / bandwidth) + launch. The rules are in LATENCY.md."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vitrify.cost.fusion import Fusion, Kernel, bytes_of
from vitrify.cost.graph import Operand, Operation
from vitrify.cost.target_file import DTYPES, FLOATS, Target
from vitrify.errors import InputError, unknown

Limit = Literal["arithmetic", "bytes", "launch"]
EightBit = Literal["int8", "fp8"]

TILE, DEPTH = 64, 256
"""Rows and columns of a product that one processor of a GPU works on at a time, and terms of the sum (split-k)."""

_SPECIAL = ("exp", "erf", "tanh", "sqrt")
_FREE = ("move",)  # bytes alone


@dataclass(frozen=True)
class Time:
    """Seconds of one kernel: its arithmetic, its bytes, its launch; the first two overlap, the launch does not."""

    arithmetic_s: float
    bytes_s: float
    launch_s: float

    @property
    def seconds(self) -> float:
        """What the kernel takes."""
        return max(self.arithmetic_s, self.bytes_s) + self.launch_s

    @property
    def limit(self) -> Limit:
        """The largest of the three."""
        parts: dict[Limit, float] = {
            "arithmetic": self.arithmetic_s,
            "bytes": self.bytes_s,
            "launch": self.launch_s,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Roofline:
    """A target, the float that the model runs in there, and what products of 8-bit numbers run as."""

    target: Target
    dtype: str
    eight_bit: EightBit
    fusion: Fusion
    weight_bytes: float

    @classmethod
    def of(cls, target: Target, dtype: str, eight_bit: str, fusion: Fusion, weight_bytes: float) -> Roofline:
        """Check the choices; InputError for a dtype that the target has no peak for."""
        if dtype not in FLOATS:
            raise unknown("dtype", str(dtype), FLOATS)
        _ = target[f"peak.{dtype}"]
        if eight_bit not in ("int8", "fp8"):
            raise unknown("8-bit format", str(eight_bit), ("int8", "fp8"))
        return cls(target, dtype, eight_bit, fusion, weight_bytes)  # type: ignore[arg-type]  # checked

    def time(self, kernel: Kernel) -> Time:
        """Return the seconds of a kernel."""
        return Time(
            arithmetic_s=sum(self.arithmetic_s(operation) for operation in kernel.operations),
            bytes_s=sum(self.move_s(operand) for operand in (*kernel.reads, *kernel.writes)),
            launch_s=self.target.si(f"launch.{self.fusion}") / self.target.si("efficiency.launch"),
        )

    def arithmetic_s(self, operation: Operation) -> float:
        """Return the seconds of an operation's arithmetic: its products, or its element-wise work.

        Raises InputError naming the operation if the target does not multiply in its format.
        """
        if operation.kind != "vector":
            return self._products_s(operation) + self.decode_s(operation) + self.round_s(operation)
        if operation.vector in _FREE:
            return 0.0
        rate = self.target.si("vector.special" if operation.vector in _SPECIAL else "vector.arithmetic")
        return operation.elements / (rate * self.target.si("efficiency.vector"))

    def _products_s(self, operation: Operation) -> float:
        kind = product_kind(operation)
        efficiency = self.target.si(f"efficiency.{kind}")
        if kind == "depthwise":  # no matrix unit takes part
            return operation.macs / (self.target.si("vector.arithmetic") * efficiency)
        try:
            peak = self.target.si(f"peak.{self.format_of(operation)}")
        except InputError as error:
            raise InputError(f"{operation.id} ({operation.module}): {error}") from error
        return 2 * operation.macs / (peak * efficiency * self._occupancy(operation))

    def decode_s(self, operation: Operation) -> float:
        """Return the seconds to turn a shift layer's codes into numbers, where that is a step of its own."""
        if operation.primitive != "shift" or "decode.shift" not in self.target:
            return 0.0
        return operation.k * operation.n * operation.count / self.target.si("decode.shift")

    def round_s(self, operation: Operation) -> float:
        """Return the seconds to round a shift layer's input to 8 bits and scale its sums back, as extra steps."""
        if product_kind(operation) != "shift8" or "decode.round" not in self.target:
            return 0.0
        return operation.m * (operation.k + operation.n) * operation.count / self.target.si("decode.round")

    def format_of(self, operation: Operation) -> str:
        """Return what a product really runs in: 8-bit operands as such, all others, codes among them, as the dtype."""
        left, right = operation.bits[:2]
        narrow = left == 8 and (right <= 8 or operation.primitive == "shift") and right > 1
        return self.eight_bit if narrow else self.dtype

    def _occupancy(self, operation: Operation) -> float:
        """Return the part of a GPU's processors that a product keeps busy, in rounds of one tile for each."""
        processors = self.target.get("units.processors", 1)
        if processors == 1:
            return 1.0
        tiles = math.ceil(operation.m / TILE) * math.ceil(operation.n / TILE) * math.ceil(operation.k / DEPTH)
        tiles *= operation.count
        return tiles / (math.ceil(tiles / processors) * processors)

    def move_s(self, operand: Operand) -> float:
        """Return the seconds to read or write an operand."""
        level = self.level_of(operand)
        bandwidth = self.target.get(f"bandwidth.{level}", self.target.si("bandwidth.memory"))
        return bytes_of(operand, DTYPES[self.dtype]) / (bandwidth * self.target.si(f"efficiency.{level}"))

    def level_of(self, operand: Operand) -> Literal["memory", "cache"]:
        """Return where an operand is: in the cache, if it fits there, but a weight only if all weights do.

        All weights pass through the cache between two uses of one; of activations only the last few are needed.
        """
        span = self.weight_bytes if operand.kind == "weight" else bytes_of(operand, DTYPES[self.dtype])
        return "cache" if span <= self.target.get("memory.cache", 0) else "memory"


def product_kind(operation: Operation) -> str:
    """Return which efficiency a product has; see `target_file.PRODUCTS`.

    "attention" is softmax's products; "batched" all others of two activations: Taylor's and Hamming's.
    """
    if operation.kind == "conv":
        return "depthwise" if operation.n == 1 else "convolution"
    if operation.primitive == "shift":
        return "shift8" if operation.bits[0] == 8 else "shift"
    if len(operation.inputs) > 1 and operation.inputs[1].kind == "weight":
        return "matmul"
    return "attention" if operation.step in ("qk", "av") and operation.primitive == "multiply" else "batched"
