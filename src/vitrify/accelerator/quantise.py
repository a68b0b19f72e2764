"""A whole model at a hardware's widths: what its accuracy is there. `vitrify eval MODEL --hardware NAME`.

Products are on integers: linear layers and convolutions, and both products of attention. What stays in float is what
the special unit does: normalisation, GELU, exponents and divisions of softmax, and sums of residual branches. Biases
are added to the sums at full precision, as an accumulator that starts from them does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vitrify.accelerator.hardware import Hardware, load
from vitrify.accelerator.rounded import (
    FixedTaylor,
    PartialSums,
    RoundedCore,
    RoundedInput,
    RoundedSoftmax,
    round_weight_,
)
from vitrify.convert import convert_
from vitrify.convert.recipes import softmax
from vitrify.errors import InputError, UnsupportedError, unknown
from vitrify.nn import Hamming, Softmax, Taylor, TaylorSparse
from vitrify.nn.attention import CoreAttention, named_cores
from vitrify.nn.mixture import Mixture, MixtureLinear
from vitrify.ops.taylor.quantised import SCHEDULES
from vitrify.ops.taylor.widths import Ranges, Widths

Form = Literal["algorithm1", "affine"]


def widths_of(hardware: str | Path | Hardware) -> Widths:
    """Return the widths that a hardware computes in.

    G and M are operands of its arrays, as activations are; divisors, k^_sum and the multipliers that change scales have
    the vector engines' width.
    """
    numbers = load(hardware).numbers
    return Widths(
        activations=numbers.activation_bits,
        weights=numbers.weight_bits,
        partial=numbers.partial_bits,
        context=numbers.activation_bits,
        key_sum=numbers.vector_bits,
        divisor=numbers.vector_bits,
        multiplier=numbers.vector_bits,
    )


def form_of(hardware: str | Path | Hardware) -> Form:
    """Return which form of Taylor attention a hardware runs: Algorithm 1 on the paper's units, else the better one."""
    return "algorithm1" if load(hardware).schedule in ("vitality", "g-stationary") else "affine"


@dataclass
class Quantised:
    """What `quantise_` did, by qualified name.

    layers     linear layers and convolutions, and what multiplies in them
    cores      attention cores
    floats     what still computes in float, and why
    overflows  layers whose sums took more bits, so far, than partial sums have; they were computed as if they had them
    """

    widths: Widths
    layers: dict[str, str] = field(default_factory=dict)
    cores: dict[str, str] = field(default_factory=dict)
    floats: dict[str, str] = field(default_factory=dict)
    overflows: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        w = self.widths
        lines = [f"activations {w.activations} bits, weights {w.weights}, partial sums {w.partial}"]
        for found in (self.layers, self.cores):
            kinds = list(found.values())
            lines += [f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)]
        lines += [f"in float: {name}: {why}" for name, why in self.floats.items()]
        if self.overflows:
            lines.append(
                f"sums of {len(self.overflows)} layers take up to {max(self.overflows.values())} bits: widened"
            )
        return "\n".join(lines)


@torch.no_grad()
def quantise_(model: nn.Module, widths: Widths, batches: Iterable[Any], form: Form = "algorithm1") -> Quantised:
    """Make `model`, converted or not, compute at these widths, in place and in eval mode; return what was done.

    batches  a few inputs of the model (Tensors, tuples of arguments or dicts of keyword arguments), from whose largest
             magnitudes every scale follows; the model runs over them once, in float. Scales are fixed from then on
    form     the schedule of Taylor attention: "algorithm1" or "affine"
    The model cannot be converted, trained or saved any more: copy it before.

    Raises InputError for no batches, another form, or numbers that are not finite; UnsupportedError for squares in
    Taylor attention, which have no schedule. Once quantised, a call raises InputError where a sum of attention
    overflows; layers note it in the report.
    """
    if form not in get_args(Form):
        raise unknown("form of Taylor attention", str(form), get_args(Form))
    report = Quantised(widths)
    conversion = convert_(model, softmax(), _plain_attention)
    report.floats |= {change.name: change.detail for change in conversion.refused}
    cores = named_cores(model)
    for name, core in cores.items():
        if isinstance(core, Taylor) and core.squares:
            raise UnsupportedError(f"{name}: squares in Taylor attention have no schedule in fixed point")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    seen = _Seen()
    with seen.watching(layers, cores):
        model.eval()
        for batch in batches:
            _call(model, batch)
    if not seen.inputs and not seen.queries:
        raise InputError("batches is empty: give a few inputs of the model")
    for name, core in cores.items():
        if name not in seen.queries:
            report.floats[name] = "never called"
        else:
            _replace(model, name, _core(name, core, seen, widths, form, report))
    shared = {
        f"{name}.{child}"
        for name, module in layers.items()
        if isinstance(module, MixtureLinear)
        for child in module.added_children
    }
    for name, layer in layers.items():
        if name not in seen.inputs:
            report.floats[name] = "never called: another module reads its weight"
            continue
        unit, report.layers[name] = round_weight_(layer, widths.weights)
        if name not in shared:  # a mixture's experts get its input as it rounds it
            rounding = RoundedInput(seen.inputs[name], widths.activations)
            layer.register_forward_pre_hook(rounding)
            if not isinstance(layer, Mixture):
                layer.register_forward_hook(PartialSums(name, unit * rounding.unit, widths.partial, report.overflows))
    return report


def _plain_attention(module: nn.Module, name: str) -> bool:
    """Say whether to give an attention module a core that can be replaced; converted ones and layers stay."""
    return not isinstance(module, (CoreAttention, Mixture, nn.Linear, nn.Conv2d))


class _Seen:
    """The largest magnitudes that layers and cores were given."""

    def __init__(self) -> None:
        self.inputs: dict[str, float] = {}
        self.queries: dict[str, Ranges] = {}
        self.calls: dict[str, tuple[int, float]] = {}

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module], cores: Mapping[str, nn.Module]) -> Iterator[None]:
        hooks = [layer.register_forward_pre_hook(partial(self._layer, name)) for name, layer in layers.items()]
        hooks += [
            core.register_forward_pre_hook(partial(self._core, name), with_kwargs=True) for name, core in cores.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layer(self, name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        largest = float(args[0].detach().abs().max()) if args[0].numel() else 0.0
        if not largest < float("inf"):
            raise InputError(f"the inputs of {name or 'the layer'} hold NaN or inf on these batches")
        self.inputs[name] = max(largest, self.inputs.get(name, 0.0))

    def _core(self, name: str, core: nn.Module, args: tuple[Tensor, ...], how: dict[str, Any]) -> None:
        found = Ranges.of(args[0], args[1], args[2], how["scale"])
        self.queries[name] = found | self.queries.get(name, found)
        self.calls[name] = args[1].shape[2], how["scale"]


def _core(name: str, core: nn.Module, seen: _Seen, widths: Widths, form: Form, report: Quantised) -> nn.Module:
    ranges = seen.queries[name]
    largest = ranges.query, ranges.key, ranges.value
    if isinstance(core, Hamming):
        report.cores[name] = "attention on binary codes, as it is"
        return core
    if isinstance(core, Taylor) and not (isinstance(core, TaylorSparse) and not core.low_rank):
        report.cores[name] = f"Taylor attention, {form}"
        return FixedTaylor(name, core, SCHEDULES[form].of(ranges, *seen.calls[name], widths))
    assert isinstance(core, (Softmax, TaylorSparse))
    kind: Callable[..., nn.Module] = RoundedSoftmax if isinstance(core, Softmax) else RoundedCore
    report.cores[name] = f"softmax attention, {widths.activations}-bit operands"
    return kind(core, largest, widths)


def _replace(model: nn.Module, name: str, core: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, core)


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
