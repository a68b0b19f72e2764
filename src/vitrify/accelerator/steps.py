"""What each operation of Taylor attention computes in integers: the graph's operations, and the steps they stand for."""

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


def steps_of(operations: Sequence[Operation], attention: Algorithm1 | Affine) -> list[Step]:
    """Return the step of each operation. Raises InputError unless they are one core, in the form of `attention`."""
    of = _of_affine if isinstance(attention, Affine) else _of_algorithm1
    return [of(operation, attention) for operation in operations]  # type: ignore[arg-type]


def _of_algorithm1(operation: Operation, attention: Algorithm1) -> Step:
    partial = attention.widths.partial
    match operation.step, operation.kind, operation.vector:
        case "1" | "3", "vector", "add" if _sums(operation):
            return Step(_same, summed=True)
        case "1", "vector", "div":
            return Step(attention.mean)
        case "1", "vector", "add":
            return Step(attention.centre_key)
        case "2", "matmul", _:
            return Step(attention.context, summed=True)
        case "4", "matmul", _:
            return Step(_same, operand=lambda key_sum: attention.key_operand(key_sum).mT)
        case "4", "vector", "add":
            return Step(attention.denominator)
        case "5", "vector", "mul":
            return Step(attention.start)
        case "5", "matmul", _:
            return Step(_same)
        case "5", "vector", "add":
            return Step(lambda product, start: check_fits(start + product, partial, "T_N"))
        case "6", "vector", "div":
            return Step(attention.score)
    raise _other(operation, "algorithm1")


def _of_affine(operation: Operation, attention: Affine) -> Step:
    partial = attention.widths.partial
    match operation.step, operation.kind, operation.vector:
        case "M", "vector", "add" if _sums(operation):
            return Step(_same, summed=True)
        case "M", "vector", "mul" | "div" if operation.outputs[0].shape[-2] == 1:
            return Step(attention.mean)
        case "M", "vector", "add":
            of_keys = base(operation.inputs[0].tensor) == "input1"
            return Step(attention.centre_key if of_keys else attention.centre_value)
        case "M", "matmul", _:
            return Step(_same, summed=True)
        case "M", "vector", "mul":
            return Step(attention.context)
        case "apply", "matmul", _:
            return Step(_same)
        case "apply", "vector", "add":
            return Step(
                lambda product, mean: attention.score(check_fits(attention.start(mean) + product, partial, "Z"))
            )
    raise _other(operation, "affine")


def _sums(operation: Operation) -> bool:
    return len(operation.inputs) == 1 and operation.outputs[0].shape[-2] == 1


def _other(operation: Operation, form: str) -> InputError:
    what = operation.vector or operation.kind
    return InputError(f"{operation.id} ({what}, step {operation.step!r}) is no part of Taylor attention in form {form}")
