"""What fixed-point Taylor attention is told before any data flow: widths in bits, ranges of real data, and units."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vitrify.errors import InputError
from vitrify.ops.fixed_point import limits, scale_for
from vitrify.ops.taylor import reference


@dataclass(frozen=True)
class Widths:
    """Bits of everything that a data path holds, signed unless said otherwise.

    activations  queries, keys, values, centred keys, and the result
    weights      of linear layers; attention has none
    partial      accumulators of products and of column sums
    context      G or M, as the second product's operand
    key_sum      k^_sum, as the operand of the denominators' product
    fraction     behind the point of the keys' mean, as it leaves the divider
    divisor      denominators, unsigned
    multiplier   of a `Requantiser`, unsigned
    """

    activations: int = 8
    weights: int = 8
    partial: int = 24
    context: int = 8
    key_sum: int = 16
    fraction: int = 8
    divisor: int = 16
    multiplier: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            bits = getattr(self, field.name)
            low, high = (0, 16) if field.name == "fraction" else (2, 40 if field.name == "partial" else 16)
            if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:
                raise InputError(f"{field.name} must be an integer from {low} to {high} bits, not {bits!r}")


@dataclass(frozen=True)
class Ranges:
    """The largest magnitudes of real data, from which scales follow: `Ranges.of` a batch, `|` of two batches.

    centred_*  less the mean over the tokens; context of G = K^^T V; output of Z, and of vbar, which is Z for a query 0
    """

    query: float
    key: float
    value: float
    centred_key: float
    centred_value: float
    context: float
    output: float

    @classmethod
    @torch.no_grad()
    def of(cls, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Ranges:
        """Return those of float tensors (B, H, N, D), in float64. Raises InputError if they are not finite."""
        query, key, value = (t.double() for t in (query, key, value))
        centred = [t - t.mean(-2, keepdim=True) for t in (key, value)]
        out, state = reference.affine(query, key, value, None, scale)
        context = state.M * (key.shape[2] / scale)
        output = torch.cat([out, state.vbar], -2)
        found = cls(*(float(t.abs().amax()) for t in (query, key, value, *centred, context, output)))
        if not all(math.isfinite(getattr(found, field.name)) for field in fields(found)):
            raise InputError(f"queries, keys and values must be finite to find their ranges, not {found}")
        return found

    def __or__(self, other: Ranges) -> Ranges:
        return Ranges(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))


@dataclass(frozen=True)
class Units:
    """The real value of one unit of each tensor, from its range.

    key_shift, value_shift  fraction bits that a centred key or value has over a key or value
    """

    query: float
    key: float
    value: float
    output: float
    key_shift: int
    value_shift: int

    @classmethod
    def of(cls, ranges: Ranges, widths: Widths) -> Units:
        """Return those at which the largest magnitude is the largest code."""
        bits = widths.activations
        largest = (ranges.query, ranges.key, ranges.value, ranges.output)
        query, key, value, output = (scale_for(x, bits) for x in largest)

        def finer(unit: float, centred: float) -> int:
            """Never coarser: the few that are further from the mean than any is from 0 rather saturate."""
            room = math.floor(math.log2(limits(bits)[1] * unit / centred)) if centred else 0
            return min(max(room, 0), widths.fraction)

        return cls(query, key, value, output, finer(key, ranges.centred_key), finer(value, ranges.centred_value))

    @property
    def centred_key(self) -> float:
        """Of centred keys."""
        return self.key * 2.0**-self.key_shift

    @property
    def centred_value(self) -> float:
        """Of centred values."""
        return self.value * 2.0**-self.value_shift

    def context(self, largest: float, total: float, widths: Widths) -> float:
        """Of G or M: fine, but so that a sum up to `total` after its product with Q has a bit to spare."""
        return max(scale_for(largest, widths.context), total / (1 << (widths.partial - 2)) / self.query)
