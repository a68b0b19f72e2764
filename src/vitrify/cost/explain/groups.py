"""Which part of a Vision Transformer each operation belongs to: the rows of the advisor's table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from vitrify.convert import Recipe
from vitrify.convert.adapters import adapter_for, looks_like_attention
from vitrify.convert.conversion import Conversion
from vitrify.convert.linears import plan_linears
from vitrify.convert.specs import LinearSpec
from vitrify.cost.graph import Operation, Workload

Group = Literal["patch embedding", "attention core", "projections", "MLP", "convolutions", "norms, residuals", "head"]
GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass(frozen=True)
class Layout:
    """Names of modules, from the model before anything is converted: a conversion keeps them.

    attention     the attention modules
    projections   the linear layers and convolutions in them
    mlps          the MLPs beside them: the layers, and what else lies between those
    blocks        what holds exactly an attention module and what is around it
    """

    attention: tuple[str, ...]
    projections: tuple[str, ...]
    mlps: tuple[str, ...]
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Find them."""
        attention = _attention(model)
        layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        inside = tuple(name for name in layers if within(name, attention))
        recipe = Recipe("mlp", mlp=LinearSpec("shift"))
        sites = plan_linears(model, recipe, None, attention, Conversion(recipe))
        mlps = {_mlp_of(site.name, attention) for site in sites}
        return cls(tuple(attention), inside, tuple(sorted(mlps)), tuple({_parent(name) for name in attention}))

    def groups(self, workload: Workload) -> dict[str, Group]:
        """Return the group of each operation by its id."""
        found = {operation.id: self._group(operation) for operation in workload.operations}
        inner = ("attention core", "projections", "MLP") if self.attention else ("convolutions",)
        middle = [i for i, op in enumerate(workload.operations) if found[op.id] in inner]
        first, last = (middle[0], middle[-1]) if middle else (0, len(found))
        for index, operation in enumerate(workload.operations):
            if found[operation.id] in ("norms, residuals", "convolutions") and not self._in_a_block(operation):
                if index < first:
                    found[operation.id] = "patch embedding"
                elif index > last:
                    found[operation.id] = "head"
        return found

    def _group(self, operation: Operation) -> Group:
        name = operation.module
        if within(name, self.mlps):
            return "MLP"
        if within(name, self.attention):
            if operation.step or "value_conv" in name.split("."):
                return "attention core"
            weighs = operation.kind != "vector" and any(operand.kind == "weight" for operand in operation.inputs[:2])
            return "projections" if weighs or within(name, self.projections) else "attention core"
        return "convolutions" if operation.kind == "conv" else "norms, residuals"

    def _in_a_block(self, operation: Operation) -> bool:
        return any(block and within(operation.module, (block,)) for block in self.blocks)


def _attention(model: nn.Module) -> dict[str, nn.Module]:
    """Return the innermost attention modules by name, as `convert_` takes them."""
    known = {name for name, module in model.named_modules() if adapter_for(module) is not None}
    likely = {name for name, module in model.named_modules() if name and looks_like_attention(module)}
    found = {name for name in known | likely if name in known or not any(within(o, (name,)) for o in likely - {name})}
    return {name: model.get_submodule(name) for name in sorted(found)}


def _mlp_of(layer: str, attention: Iterable[str]) -> str:
    """Return the module around an MLP's layer, unless that holds an attention module as well."""
    parent = _parent(layer)
    return layer if not parent or any(within(name, (parent,)) for name in attention) else parent


def within(name: str, parents: Iterable[str]) -> bool:
    """Say whether a module is one of `parents`, or inside one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
