"""Taylor attention in fixed point: bit for bit what an accelerator with integer data computes, in both its schedules.

`Algorithm1` is ViTALiTy's six steps (docs/papers.md 1), `Affine` the form they reduce to (docs/papers.md 2). Both are
made from the ranges of real data before any data flow (`Ranges`, `Widths`); from then on all is integers. Their methods
are the steps, one engine's work each, and take whole tensors or any tile of them: a machine that runs tile by tile
computes the same bits if it calls them, because

- sums are exact: an accumulator neither rounds nor saturates while it adds, so that the order of its terms does not
  matter. A sum that does not fit its accumulator in the end raises InputError;
- everything else (`centre_key`, `context`, `start`, ...) is element by element, with one rounding, half up, and
  saturation as the result is written out.

Scales are symmetric, per tensor (all heads, all images) and fixed; what changes scale is multiplied by an integer and
shifted (`Requantiser`), but what is centred by a power of two alone. How many bits each product takes is in README.md.
Shapes: query (B, H, Nq, D), key (B, H, Nk, D), value (B, H, Nk, Dv), int64 or narrower -> (B, H, Nq, Dv), int64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from vitrify.errors import InputError
from vitrify.ops.fixed_point import (
    Requantiser,
    check_fits,
    limits,
    product,
    quantise,
    round_divide,
    round_shift,
    saturate,
)
from vitrify.ops.taylor.widths import Ranges, Units, Widths


@dataclass(frozen=True)
class _Schedule:
    """What both schedules know: widths, the number of keys n, and the real values of units."""

    widths: Widths
    tokens: int
    units: Units

    def quantise(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the codes of real queries, keys and values."""
        bits = self.widths.activations
        return (
            quantise(query, self.units.query, bits),
            quantise(key, self.units.key, bits),
            quantise(value, self.units.value, bits),
        )

    def sum_tokens(self, x: Tensor, what: str) -> Tensor:
        """Return the column sums over the tokens (..., N, D) -> (..., 1, D), exact; the accumulator array's work."""
        return check_fits(x.sum(-2, keepdim=True), self.widths.partial, what)

    def centre_key(self, key: Tensor, mean: Tensor) -> Tensor:
        """Return centred keys (..., N, D), in the keys' width and unit or a finer one; the adder array's work."""
        return self._centre(key, mean, self.units.key_shift)

    def _centre(self, x: Tensor, mean: Tensor, shift: int) -> Tensor:
        difference = (x << self.widths.fraction) - mean
        return saturate(round_shift(difference, self.widths.fraction - shift), self.widths.activations)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = limits(self.widths.activations)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.is_floating_point() or tensor.dim() != 4:
                raise InputError(f"{name} must hold integers (B, H, N, D), not {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.numel() and (int(tensor.min()) < low or int(tensor.max()) > high):
                raise InputError(f"{name} must be codes from {low} to {high}")
        if key.shape[2] != self.tokens or value.shape[2] != self.tokens:
            raise InputError(f"{key.shape[2]} keys and {value.shape[2]} values, but the schedule is for {self.tokens}")
        return query.long(), key.long(), value.long()


@dataclass(frozen=True)
class Algorithm1(_Schedule):
    """ViTALiTy's six steps: a product for the denominators, and a division per row.

    to_context    from K^^T V to G; to_numerator from v_sum to the units of Q G; to_divisor from Q k^_sum^T to t_D's
    constant      n / scale in the units of t_D, which are chosen so that T_N 2^dividend_shift / t_D is Z in its units
    """

    to_context: Requantiser
    to_numerator: Requantiser
    to_divisor: Requantiser
    constant: int
    dividend_shift: int

    @classmethod
    def of(cls, ranges: Ranges, tokens: int, scale: float, widths: Widths) -> Self:
        """Return the schedule for `tokens` keys and logits times `scale`, with every constant chosen for `ranges`."""
        units = Units.of(ranges, widths)
        rows = tokens / scale  # n sqrt(d), what a row of Algorithm 1 is divided by
        context = units.context(ranges.context, ranges.output * rows, widths)
        numerator = units.query * context
        constant = rows * units.output / numerator
        # t_D is near its constant, so half of the divisor's range is right for it.
        dividend_shift = widths.divisor - 1 - math.frexp(constant)[1]
        divisor = numerator / units.output * 2.0**-dividend_shift
        return cls(
            widths,
            tokens,
            units,
            Requantiser.of(units.centred_key * units.value / context, widths.context, widths.multiplier),
            Requantiser.of(units.value / (scale * numerator), widths.partial, widths.multiplier),
            Requantiser.of(units.query * units.centred_key / divisor, widths.divisor + 1, widths.multiplier),
            math.floor(constant * 2.0**dividend_shift + 0.5),
            dividend_shift,
        )

    def mean(self, column_sum: Tensor) -> Tensor:
        """Step 1: kbar with its fraction bits, (..., 1, D); the divider array's work, one divisor for all."""
        return round_divide(column_sum << self.widths.fraction, self.tokens)

    def context(self, accumulated: Tensor) -> Tensor:
        """Step 2: G (..., D, Dv) as it is written out, from K^^T V as it was accumulated."""
        return self.to_context(accumulated)

    def key_operand(self, centred_sum: Tensor) -> Tensor:
        """Step 3: k^_sum as the denominators' operand, (..., 1, D).

        It is not 0: the keys of a channel are whole numbers, so rounding moves all its centred keys by the same, up to
        half a unit, and their sum by up to n / 2.
        """
        return saturate(centred_sum, self.widths.key_sum)

    def denominator(self, accumulated: Tensor) -> Tensor:
        """Step 4: t_D (..., N, 1) from Q k^_sum^T as it was accumulated; at least 1, whatever the data."""
        return (self.to_divisor(accumulated) + self.constant).clamp(1, (1 << self.widths.divisor) - 1)

    def start(self, value_sum: Tensor) -> Tensor:
        """Step 5: sqrt(d) v_sum (..., 1, Dv) in the units of Q G, which is added to it."""
        return self.to_numerator(value_sum)

    def score(self, numerator: Tensor, denominator: Tensor) -> Tensor:
        """Step 6: Z (..., N, Dv) from T_N and t_D; the divider array's work, one divisor per row."""
        dividend = round_shift(numerator, -self.dividend_shift)
        return saturate(round_divide(dividend, denominator), self.widths.activations)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the codes of Z. Raises InputError for other codes or shapes, and for a sum that does not fit."""
        query, key, value = self._check(query, key, value)
        partial = self.widths.partial
        centred = self.centre_key(key, self.mean(self.sum_tokens(key, "the sum of the keys")))
        context = self.context(product(centred.mT, value, partial, "G = K^^T V"))
        key_operand = self.key_operand(self.sum_tokens(centred, "k^_sum"))
        value_sum = self.sum_tokens(value, "v_sum")
        denominator = self.denominator(product(query, key_operand.mT, partial, "Q k^_sum^T"))
        numerator = self.start(value_sum) + product(query, context, partial, "Q G")
        return self.score(check_fits(numerator, partial, "T_N"), denominator)


@dataclass(frozen=True)
class Affine(_Schedule):
    """Z = vbar + Q M from centred keys and values: nothing is divided, for n is known before.

    Centring both is what makes it safe to leave k^_sum out: what rounding adds to all keys of a channel meets centred
    values, which sum to next to 0.
    to_mean     from column sums to means with their fraction bits; to_context from K^^T V^ to M;
    to_numerator from vbar to the units of Q M; to_output from their sum to Z
    """

    to_mean: Requantiser
    to_context: Requantiser
    to_numerator: Requantiser
    to_output: Requantiser

    @classmethod
    def of(cls, ranges: Ranges, tokens: int, scale: float, widths: Widths) -> Self:
        """Return the schedule for `tokens` keys and logits times `scale`, with every constant chosen for `ranges`."""
        units = Units.of(ranges, widths)
        weight = scale / tokens
        context = units.context(ranges.context * weight, ranges.output, widths)
        numerator = units.query * context
        one = 2.0**widths.fraction
        product_unit = units.centred_key * units.centred_value
        return cls(
            widths,
            tokens,
            units,
            Requantiser.of(one / tokens, widths.activations + widths.fraction, widths.multiplier),
            Requantiser.of(product_unit * weight / context, widths.context, widths.multiplier),
            Requantiser.of(units.value / one / numerator, widths.partial, widths.multiplier),
            Requantiser.of(numerator / units.output, widths.activations, widths.multiplier),
        )

    def mean(self, column_sum: Tensor) -> Tensor:
        """Return kbar or vbar with its fraction bits, (..., 1, D), from the column sums: a product with 1/n."""
        return self.to_mean(column_sum)

    def centre_value(self, value: Tensor, mean: Tensor) -> Tensor:
        """Return centred values (..., N, Dv), as `centre_key` does keys."""
        return self._centre(value, mean, self.units.value_shift)

    def context(self, accumulated: Tensor) -> Tensor:
        """M (..., D, Dv) as it is written out, from K^^T V^ as it was accumulated."""
        return self.to_context(accumulated)

    def start(self, mean: Tensor) -> Tensor:
        """Return vbar (..., 1, Dv) in the units of Q M, which is added to it."""
        return self.to_numerator(mean)

    def score(self, accumulated: Tensor) -> Tensor:
        """Return Z (..., N, Dv) as it is written out."""
        return self.to_output(accumulated)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the codes of Z. Raises InputError for other codes or shapes, and for a sum that does not fit."""
        query, key, value = self._check(query, key, value)
        partial = self.widths.partial
        centred_key = self.centre_key(key, self.mean(self.sum_tokens(key, "the sum of the keys")))
        mean = self.mean(self.sum_tokens(value, "v_sum"))
        context = self.context(product(centred_key.mT, self.centre_value(value, mean), partial, "K^^T V^"))
        total = self.start(mean) + product(query, context, partial, "Q M")
        return self.score(check_fits(total, partial, "vbar + Q M"))


SCHEDULES: dict[str, type[Algorithm1] | type[Affine]] = {"algorithm1": Algorithm1, "affine": Affine}
