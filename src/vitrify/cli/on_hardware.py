"""MODEL as each modelled accelerator runs it: the original with softmax attention, or converted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from vitrify.cli import weightless

if TYPE_CHECKING:
    from torch import nn

    from vitrify.accelerator.hardware import Hardware
    from vitrify.cost.workload import Workload

LINEAR = ("vitality", "vitality-affine", "g-stationary")
"""Schedules that are made for linear attention."""
_ORIGINAL, _AS_CONVERTED = "original", "as converted"


def takes_recipe(machine: Hardware) -> bool:
    """Say whether a hardware runs the converted model: it is made for linear attention, or shifts or adds."""
    return machine.schedule in LINEAR or _shifts_or_adds(machine)


def _shifts_or_adds(machine: Hardware) -> bool:
    return any(primitive != "multiply" for array in machine.arrays.values() for primitive in array.primitives)


class Models:
    """MODEL, as each hardware runs it: original, or converted; traced once for each."""

    def __init__(
        self, spec: str, img_size: int | None, recipe: str | None, batch_size: int, taylor: str | None
    ) -> None:
        from vitrify.artefact import is_plain
        from vitrify.cost.explain.groups import Layout

        self._spec, self._img_size, self._recipe = spec, img_size, recipe
        self._batch_size, self._taylor = batch_size, taylor
        self._traced: dict[tuple[str, str], Workload] = {}
        given, self._size = weightless.load(spec, img_size)
        self._is_plain = is_plain(given)
        original = given if self._is_plain else _unconverted(given)
        self._models: dict[str, nn.Module] = {_AS_CONVERTED: given, _ORIGINAL: original}
        self.layout = Layout.of(original)

    @property
    def input_shape(self) -> list[int]:
        """(images, channels, height, width)."""
        return [self._batch_size, *self._size]

    @property
    def size_text(self) -> str:
        """The images, for a reader."""
        return f"{' x '.join(map(str, self._size[1:]))} px, batch {self._batch_size}"

    def model_on(self, machine: Hardware) -> str:
        """Return which model a hardware runs: "original", "as converted", or the recipe that MODEL is converted by."""
        if not takes_recipe(machine):
            return _ORIGINAL
        if self._recipe is None and not self._is_plain:
            return _AS_CONVERTED
        return self._recipe or ("vitrify" if _shifts_or_adds(machine) else "vitality")

    def workload(self, machine: Hardware) -> Workload:
        """Return what a forward pass on a hardware does."""
        from vitrify.accelerator.quantise import form_of
        from vitrify.cost.workload import workload

        which, form = self.model_on(machine), self._taylor or form_of(machine)
        if (which, form) not in self._traced:
            if which not in self._models:
                self._models[which] = self._convert(which)
            model = self._models[which]
            self._traced[which, form] = workload(model, self._size, self._batch_size, taylor=form)  # type: ignore[arg-type]
        return self._traced[which, form]

    def _convert(self, recipe: str) -> nn.Module:
        from vitrify import recipes
        from vitrify.convert import convert_

        model, _ = weightless.load(self._spec, self._img_size)
        conversion = convert_(model, recipes.get(recipe), input_size=self._size)
        counts = ", ".join(f"{len(getattr(conversion, group))} {group}" for group in ("changed", "kept", "refused"))
        typer.echo(f"recipe {conversion.recipe.name}: {counts} (`vitrify convert` says why)", err=True)
        return model


def _unconverted(model: nn.Module) -> nn.Module:
    """Return the architecture of a converted model before its conversion."""
    import torch

    from vitrify.artefact.builders import describe, rebuild

    record: dict[str, Any] = getattr(model, "_vitrify_builder", None) or {}
    record = record if "library" in record else describe(model, set())
    if record["library"] != "timm":
        return rebuild(record).eval()
    with torch.device("meta"):
        return rebuild(record).eval()
