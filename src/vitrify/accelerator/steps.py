"""What each operation of Taylor attention computes in integers: the workload's operations, and the steps they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from vitrify.accelerator.placement import base
from vitrify.cost.graph import Operation
from vitrify.errors import InputError
from vitrify.ops.fixed_point import check_fits
from vitrify.ops.taylor.quantised import Affine, Algorithm1


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Step:
    """One operation in integers.

    compute   of vector work: the result from the operands; of sums and products: what is written out from what was
              accumulated
    summed    tiles are of what is added up over the tokens, and give one result together
    operand   what a product's right operand (k, n) is made of
    """

    compute: Callable[..., Tensor]
    summed: bool = False
    operand: Callable[[Tensor], Tensor] = _same


_Key = tuple[str, str, str]
"""The step; what is done, with the number of operands; and what the first operand is: "key", "product", or any."""


def steps_of(operations: Sequence[Operation], attention: Algorithm1 | Affine) -> list[Step]:
    """Return the step of each operation of one attention core, which was called with (query, key, value).

    Raises InputError for an operation that is none, or of the other form than `attention`.
    """
    table = _algorithm1(attention) if isinstance(attention, Algorithm1) else _affine(attention)
    products = {operation.outputs[0].tensor for operation in operations if operation.kind == "matmul"}
    found = []
    for operation in operations:
        source = base(operation.inputs[0].tensor)
        does = operation.vector or operation.kind
        what = f"{does} {len(operation.inputs)}"
        of = "key" if source == "input1" else "product" if source in products else ""
        step = table.get((operation.step, what, of), table.get((operation.step, what, "")))
        if step is None:
            raise InputError(
                f"{operation.id} ({does}, step {operation.step!r}) is no part of Taylor attention as "
                f"{type(attention).__name__} computes it"
            )
        found.append(step)
    return found


def _algorithm1(attention: Algorithm1) -> dict[_Key, Step]:
    total = Step(_same, summed=True)

    def numerator(product: Tensor, start: Tensor) -> Tensor:
        return check_fits(start + product, attention.widths.partial, "T_N")

    return {
        ("1", "add 1", ""): total,
        ("1", "div 1", ""): Step(attention.mean),
        ("1", "add 2", ""): Step(attention.centre_key),
        ("2", "matmul 2", ""): Step(attention.context, summed=True),
        ("3", "add 1", ""): total,
        ("4", "matmul 2", ""): Step(_same, operand=lambda key_sum: attention.key_operand(key_sum).mT),
        ("4", "add 1", ""): Step(attention.denominator),
        ("5", "mul 1", ""): Step(attention.start),
        ("5", "matmul 2", ""): Step(_same),
        ("5", "add 2", ""): Step(numerator),
        ("6", "div 2", ""): Step(attention.score),
    }


def _affine(attention: Affine) -> dict[_Key, Step]:
    def score(product: Tensor, mean: Tensor) -> Tensor:
        return attention.score(check_fits(attention.start(mean) + product, attention.widths.partial, "vbar + Q M"))

    return {
        ("M", "add 1", ""): Step(_same, summed=True),
        ("M", "div 1", ""): Step(attention.mean),
        ("M", "mul 1", ""): Step(attention.mean),  # a product with 1/n, on hardware without dividers
        ("M", "add 2", "key"): Step(attention.centre_key),
        ("M", "add 2", ""): Step(attention.centre_value),
        ("M", "matmul 2", ""): Step(_same, summed=True),
        ("M", "mul 1", "product"): Step(attention.context),
        ("apply", "matmul 2", ""): Step(_same),
        ("apply", "add 2", ""): Step(score),
    }
