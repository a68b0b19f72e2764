"""What a model would be with another primitive in each of its groups: copies without weights, converted and traced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import nn

from vitrify.convert import AttentionSpec, LinearSpec, Recipe, convert_
from vitrify.cost.explain.groups import Group, Layout, within
from vitrify.cost.graph import Operand, Operation, Workload
from vitrify.cost.workload import workload
from vitrify.nn import IntLinear, ShiftLinear
from vitrify.nn.copying import empty_hooks

Primitive = Literal["taylor", "hamming", "shift", "shift8", "mixture", "int8", "fp8"]
PRIMITIVES: tuple[Primitive, ...] = get_args(Primitive)

InputSize = tuple[int, int, int]
ROLES: Mapping[Group, str] = {"attention core": "attention", "projections": "projections", "MLP": "mlp"}
"""The groups that a recipe has a field for."""

# Each primitive as a recipe has it; shift8 rounds activations to 8 bits, so that a machine's 8-bit products serve it.
# int8 and fp8 are no recipe's: they are what one would take instead of shifts.
SPECS: Mapping[Primitive, AttentionSpec | LinearSpec] = {
    "taylor": AttentionSpec("taylor"),
    "hamming": AttentionSpec("hamming", bias="drop"),
    "shift": LinearSpec("shift"),
    "shift8": LinearSpec("shift", activations="float8"),
    "mixture": LinearSpec("mixture"),
}


@dataclass(frozen=True)
class Variant:
    """A workload, and which primitive each group got in it; a group that could not be converted is left out."""

    workload: Workload
    made: Mapping[Group, Primitive]


def recipe_for(name: str, made: Mapping[Group, Primitive], eight_bit: str = "fp8") -> Recipe:
    """Return the recipe that puts these primitives where they are said to go; the rest stays as it is.

    eight_bit: what 8-bit activations are, "fp8" or "int8".
    """
    specs = {ROLES[group]: SPECS[primitive] for group, primitive in made.items()}
    for role, spec in specs.items():
        if isinstance(spec, LinearSpec) and spec.activations != "float":
            specs[role] = replace(spec, activations="float8" if eight_bit == "fp8" else "int8")
    return Recipe(name, **specs)  # type: ignore[arg-type]


def variants(model: nn.Module, layout: Layout, input_size: InputSize, batch_size: int) -> list[Variant]:
    """Return workloads in which together each primitive is tried in each group: one trace tries it in several.

    That is sound as what a group costs depends on no other group, but for what fusion moves across their borders.
    """
    tries: tuple[dict[Group, Primitive], ...] = (
        {"attention core": "taylor", "projections": "shift", "MLP": "shift"},
        {"attention core": "hamming", "projections": "mixture", "MLP": "mixture"},
        {"projections": "shift8", "MLP": "shift8"},
        {"projections": "int8", "MLP": "int8"},
    )
    found = (variant(model, layout, made, input_size, batch_size) for made in tries)
    return [one for one in found if one is not None]


def variant(
    model: nn.Module, layout: Layout, made: Mapping[Group, Primitive], input_size: InputSize, batch_size: int
) -> Variant | None:
    """Return what the model would do with these primitives; None if not one of the groups can be converted."""
    copied = meta_copy(model)
    done = convert(copied, layout, made, input_size)
    return Variant(workload(copied, input_size, batch_size), {g: made[g] for g in made if g in done}) if done else None


def convert(model: nn.Module, layout: Layout, made: Mapping[Group, Primitive], input_size: InputSize) -> set[Group]:
    """Convert a model in place, and return the groups in which something was changed."""
    # Integer layers measure their weight's error when a recipe makes them, and there may be no weights.
    asked: dict[Group, Primitive] = {g: "shift" if p == "int8" else p for g, p in made.items()}
    applied = convert_(model, recipe_for("explain", asked), input_size=input_size).applied
    changed = {name for name, spec in applied.items() if spec in SPECS.values()}
    members: dict[Group, tuple[str, ...]] = {
        "attention core": layout.attention,
        "projections": layout.projections,
        "MLP": layout.mlps,
    }
    done = {group for group in made if any(within(name, members[group]) for name in changed)}
    for name in changed:
        module = model.get_submodule(name)
        if isinstance(module, ShiftLinear) and any(
            made[group] == "int8" and within(name, members[group]) for group in done
        ):
            IntLinear.adopt_(cast(nn.Linear, module.restore_()))
    return done


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that has shapes and no memory, and no record of an earlier conversion.

    That record names modules which a pruned copy lacks.
    """
    memo = empty_hooks(model)
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = copy.deepcopy(model, memo).eval()
    copied.__dict__.pop("_vitrify", None)
    return copied


def in_dtype(workload: Workload, bits: int) -> Workload:
    """Return the workload of a model that runs in floats of another width; integers, codes and sums stay.

    Sums have 32 bits whatever the operands have.
    """
    return replace(workload, operations=tuple(_operation_in(operation, bits) for operation in workload.operations))


def _operation_in(operation: Operation, bits: int) -> Operation:
    left, right, psum = (bits if width in (16, 32) else width for width in operation.bits)
    return replace(
        operation,
        inputs=tuple(_operand_in(operand, bits) for operand in operation.inputs),
        outputs=tuple(_operand_in(operand, bits) for operand in operation.outputs),
        bits=(left, right, psum if operation.kind == "vector" else operation.bits[2]),
    )


def _operand_in(operand: Operand, bits: int) -> Operand:
    return replace(operand, bits=bits) if operand.bits in (16, 32) else operand
