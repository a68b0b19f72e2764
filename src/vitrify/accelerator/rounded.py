"""Layers and attention cores on rounded numbers: what a hardware with few bits makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import ShiftConv2d, ShiftLinear
from vitrify.nn.bias import bias_weights
from vitrify.nn.cores import Core, Dropout, Taylor, add_mask
from vitrify.nn.integer import IntLinear, fake_quantise
from vitrify.ops.fixed_point import limits, scale_for
from vitrify.ops.shift import reference as shift
from vitrify.ops.shift import shift_quantize
from vitrify.ops.taylor.quantised import Affine, Algorithm1
from vitrify.ops.taylor.widths import Widths

Layer = nn.Linear | nn.Conv2d


def rounded(x: Tensor, unit: float | Tensor, bits: int) -> Tensor:
    """Return x rounded half up to multiples of `unit` and saturated at `bits` bits, in its own dtype."""
    return (x / unit + 0.5).floor_().clamp_(*limits(bits)).mul_(unit)


class RoundedInput:
    """A forward pre-hook: rounds a layer's input to one scale for the tensor, found beforehand."""

    def __init__(self, largest: float, bits: int) -> None:
        self.unit, self.bits = scale_for(largest, bits), bits

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the arguments, the first of them rounded."""
        return (rounded(args[0], self.unit, self.bits), *args[1:])


class PartialSums:
    """A forward hook: notes how many bits a layer's sums take where an accumulator has fewer.

    unit   of the sums, per output channel: the input's times the weight's
    found  where to note it: {layer: bits}
    """

    def __init__(self, name: str, unit: Tensor, bits: int, found: dict[str, int]) -> None:
        self.name, self.unit, self.bits, self.found = name, unit, bits, found

    def __call__(self, layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Look at the sums behind a layer's output."""
        channels = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
        sums = channels if layer.bias is None else channels - layer.bias
        largest = int((sums.detach().flatten(0, -2).abs().amax(0) / self.unit).max()) if sums.numel() else 0
        if largest > limits(self.bits)[1]:
            self.found[self.name] = max(largest.bit_length() + 1, self.found.get(self.name, 0))


@torch.no_grad()
def round_weight_(layer: Layer, bits: int) -> tuple[Tensor, str]:
    """Round a layer's weight in place to what multiplies; return the real value of its unit (out,), and what it is.

    Shift layers keep their codes and integer layers their own widths; both take their activations from `RoundedInput`
    from now on. Others are rounded to `bits` bits, symmetric, one scale per output channel.
    """
    if isinstance(layer, (ShiftLinear, ShiftConv2d)):
        if isinstance(layer, ShiftLinear):
            layer.activations = "float"
        exponent = layer.exponent if layer.packed else shift_quantize(layer.weight, layer.bits, layer.variant)[1]
        lowest = exponent.int() - shift.top_level(layer.bits) + shift.lowest_level(layer.variant)
        return shift.power_of_two(lowest).float(), f"shift, {layer.bits}-bit codes"
    if isinstance(layer, IntLinear):
        bits = layer.bits
        layer.weight.copy_(fake_quantise(layer.weight, bits))
        layer.restore_()
        return _unit(layer.weight, bits), f"multiply, {bits}-bit weights"
    unit = _unit(layer.weight, bits)
    layer.weight.copy_(rounded(layer.weight, shift.per_channel(unit, layer.weight), bits))
    return unit, f"multiply, {bits}-bit weights"


def _unit(weight: Tensor, bits: int) -> Tensor:
    unit = weight.detach().abs().flatten(1).amax(1) / limits(bits)[1]
    return torch.where(unit > 0, unit, torch.ones_like(unit))


class FixedTaylor(Core):
    """First-order Taylor attention in integers, by one of the schedules of `ops.taylor.quantised`.

    A bias that `source` carries is added as in `nn.bias`, its weights rounded like values; the sum is in float.
    """

    def __init__(self, name: str, source: Taylor, schedule: Algorithm1 | Affine) -> None:
        super().__init__()
        self.name, self.source, self.schedule = name, source, schedule

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; shapes in `nn.cores`.

        Raises UnsupportedError for masks, InputError for another number of keys and for a sum that overflows.
        """
        if attn_mask is not None or is_causal:
            raise UnsupportedError("attention in fixed point takes no mask: n is a constant of its schedule")
        try:
            codes = self.schedule(*self.schedule.quantise(query, key, value))
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from None
        out = (codes * self.schedule.units.output).to(query.dtype)
        if bias is None or self.source.bias == "drop":
            return out
        bits = self.schedule.widths.activations
        weights = bias_weights(bias, None)
        weights = rounded(weights, scale_for(float(weights.abs().max()), bits), bits).to(value.dtype)
        return out + weights @ rounded(value, self.schedule.units.value, bits)


class _RoundedOperands(Core):
    """What other cores share: queries, keys and values are rounded to a scale for each tensor."""

    def __init__(self, source: Core, largest: tuple[float, float, float], widths: Widths) -> None:
        super().__init__()
        self.source, self.bits = source, widths.activations
        self.units = tuple(scale_for(x, self.bits) for x in largest)

    def round(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return the three rounded."""
        return [rounded(t, unit, self.bits) for t, unit in zip((query, key, value), self.units, strict=True)]


class RoundedCore(_RoundedOperands):
    """Any other core on rounded operands; its own arithmetic stays in float."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        """Attend; shapes in `nn.cores`."""
        out: Tensor = self.source(*self.round(query, key, value), attn_mask, **how)
        return out


class RoundedSoftmax(_RoundedOperands):
    """Softmax attention whose second product has rounded operands, too: exponents and sums in float, division after.

    An array's operand is exp(score - the row's largest), from 0 to 1 and in as many bits as other activations; the row
    is divided by the sum of the rounded ones, so that weights sum to 1. Rounding the weights themselves would leave
    nothing of rows that attend to everything: over 197 tokens a weight is 0.6 of 1/127.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; shapes in `nn.cores`. Dropout, which evaluation has none of, is left out."""
        query, key, value = self.round(query, key, value)
        scores = query @ key.mT * scale
        scores = add_mask(scores if bias is None else scores + bias, attn_mask, is_causal)
        powers = rounded((scores - scores.amax(-1, keepdim=True)).exp(), scale_for(1.0, self.bits), self.bits)
        return (powers @ value) / powers.sum(-1, keepdim=True)
