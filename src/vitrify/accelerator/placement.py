"""What a schedule says: which operation runs where and how. And how a program may be cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vitrify.accelerator.hardware import Dataflow, Hardware, Numbers, Systolic
from vitrify.cost.graph import Operand, Operation, Primitive
from vitrify.errors import InputError

Order = Literal["strips", "traffic"]
Drain = Literal["overlapped", "every_fold"]


@dataclass(frozen=True)
class Placement:
    """An operation on an engine.

    engine      its name; "" for data that stays where it is: views, and moves that an address does
    dataflow    what stays in the array, or None for whatever is fastest
    kept        the share of the work that is done, for each group (head of an image): a sparse mask's density
    cycles      cycles for each group, where a sparse mask says how its entries are packed
    in_place    the right operand is what the array accumulated just before: it is neither written nor read
    """

    operation: Operation
    engine: str
    dataflow: Dataflow | None = None
    kept: Sequence[float] = ()
    cycles: Sequence[int] = ()
    in_place: bool = False


@dataclass(frozen=True)
class Mapping:
    """How layers are cut into tiles. `simulate` tries several and keeps the fastest.

    tile_kib   size of a tile: two for weights, two for activations that come from DRAM and one for partial sums are
               set aside in the SRAM; activations that stay have the rest
    order      "strips": all rows of a strip of weights, then the next; "traffic": that or all weights for some rows,
               then the next, whichever moves less if activations come from DRAM
    limit      rows and columns of the arrays in use at most; None: all
    """

    tile_kib: float
    order: Order
    limit: int | None = None

    def room(self, hardware: Hardware) -> float:
        """Return the bits left for activations that stay; negative if the tiles alone are too large."""
        return (hardware.sram_kib - 5 * self.tile_kib) * 8192


def base(tensor: str) -> str:
    """Return the tensor that a view, "op4.out[1]", is a part of."""
    return tensor.partition("[")[0]


def kernel(operation: Operation) -> str:
    """Return what the operation's id has in common with all that runs with it as one kernel."""
    return operation.id.partition(".")[0]


def elements(operand: Operand) -> int:
    """Return how many elements it has."""
    return math.prod(operand.shape)


def width(operand: Operand, hardware: Hardware) -> int:
    """Return the bits in which the hardware stores one of its elements."""
    numbers = hardware.numbers
    return min(operand.bits, numbers.weight_bits if operand.kind == "weight" else numbers.activation_bits)


def operand_bits(operation: Operation, array: Systolic, hardware: Hardware) -> tuple[int, int]:
    """Return the widths in which an array takes a product's operands: their own, if it has room for them."""
    left, right = (
        min(width(o, hardware), bits) for o, bits in zip(operation.inputs[:2], operation.bits[:2], strict=True)
    )
    return min(left, array.left_bits), min(right, array.right_bits)


def partial_bits(operation: Operation, array: Systolic, hardware: Hardware) -> int:
    """Return the width of a product's partial sums, in the array and outside."""
    bits = operand_bits(operation, array, hardware)
    return min(operation.bits[2], sum_bits(operation.primitive, *bits, hardware.numbers))


def sum_bits(primitive: Primitive, left: int, right: int, numbers: Numbers) -> int:
    """Return the width of an accumulator: the products' and 8 bits more, which 256 sums fill, if there are so many.

    A code of b bits shifts by up to 2^(b - 1) - 2 places.
    """
    right = 2 ** (right - 1) - 1 if primitive == "shift" else right
    return min(left + right + 8, numbers.partial_bits)


def is_layer(placement: Placement) -> bool:
    """Say whether it is a product with weights: a linear layer or a convolution."""
    operation = placement.operation
    return operation.kind != "vector" and len(operation.inputs) > 1 and operation.inputs[1].kind == "weight"


def sums(operation: Operation) -> bool:
    """Say whether the output has fewer elements than what is read: rows, or tokens, are summed."""
    return elements(operation.outputs[0]) < max(elements(operand) for operand in operation.inputs)


def array_of(placement: Placement, hardware: Hardware) -> Systolic:
    """Return the array that a product is placed on; InputError if it is none."""
    engine = hardware.engines[placement.engine]
    if not isinstance(engine, Systolic):
        operation = placement.operation
        raise InputError(
            f"the schedule places the product {operation.id} ({operation.module}) on {placement.engine!r} of hardware "
            f"{hardware.name!r}, which is no systolic array"
        )
    return engine


def grouping(operation: Operation) -> tuple[int, int]:
    """Return (groups, rows of each) of an operation of attention: heads of images, and their queries or keys."""
    if operation.kind == "matmul":
        return operation.count, operation.m
    shape = max((o.shape for o in (*operation.inputs, *operation.outputs)), key=math.prod)
    return (math.prod(shape[:-2]), shape[-2]) if len(shape) > 2 else (1, shape[0] if len(shape) == 2 else 1)
