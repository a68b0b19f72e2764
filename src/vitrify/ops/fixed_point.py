"""Integers as a data path holds them: rounding, saturation, exact products, and the change from one scale to another.

All tensors are int64, which stand for narrower registers; no function here computes with a float but `quantise`, which
turns real numbers into codes, and `Requantiser.of`, which chooses constants before any data flow.
One rounding is used everywhere: half up (towards plus infinity), floor(x + 1/2), the adder and shift of hardware.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vitrify.errors import InputError


def limits(bits: int) -> tuple[int, int]:
    """Return the least and the largest two's complement number of that many bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def saturate(x: Tensor, bits: int) -> Tensor:
    """Return x held to what `bits` bits can hold."""
    return x.clamp(*limits(bits))


def round_shift(x: Tensor, shift: int) -> Tensor:
    """Return x / 2^shift, rounded half up; a negative shift is a multiplication by a power of two, exactly."""
    return x << -shift if shift <= 0 else (x + (1 << (shift - 1))) >> shift


def round_divide(x: Tensor, by: Tensor | int) -> Tensor:
    """Return x / by, rounded half up; by > 0."""
    return torch.div(2 * x + by, 2 * by, rounding_mode="floor")


def quantise(x: Tensor, scale: float, bits: int) -> Tensor:
    """Return the codes of real numbers x: x / scale, rounded half up and saturated; int64 of the same shape."""
    low, high = limits(bits)
    return (x.double() / scale + 0.5).floor_().clamp_(low, high).long()


def scale_for(largest: float, bits: int) -> float:
    """Return the scale, the value of one unit, at which `largest` is the largest code; 1 where all is 0."""
    return largest / limits(bits)[1] if largest > 0 else 1.0


def product(a: Tensor, b: Tensor, bits: int, what: str) -> Tensor:
    """Return a @ b for integers, as an accumulator of `bits` bits holds it at the end of the sum.

    Two's complement sums that wrap around on the way are right at the end if the result fits, so neither the order of
    the terms nor their partition into tiles matters. Raises InputError, with `what` it is, if the result does not fit.
    """
    # Exact below 2^53, in any order; and there is no product of integers on GPUs.
    return check_fits((a.double() @ b.double()).long(), bits, what)


def check_fits(x: Tensor, bits: int, what: str) -> Tensor:
    """Return x; raise InputError if a number in it does not fit into an accumulator of `bits` bits."""
    low, high = limits(bits)
    if x.numel():
        least, largest = (int(bound) for bound in x.aminmax())
        if least < low or largest > high:
            needed = max(largest.bit_length(), (-least - 1).bit_length()) + 1
            raise InputError(f"{what} reaches {needed} bits, but partial sums have {bits}: use wider ones")
    return x


@dataclass(frozen=True)
class Requantiser:
    """x -> saturate(round(x multiplier / 2^shift)): from one scale to another by an integer product and a shift.

    multiplier  of full width, so that it stands for the factor to a relative 2^-width
    shift       bits; negative for a factor that large
    bits        of the result
    """

    multiplier: int
    shift: int
    bits: int

    @classmethod
    def of(cls, factor: float, bits: int, multiplier_bits: int) -> Requantiser:
        """Return the one that multiplies by `factor` > 0, with an unsigned multiplier of `multiplier_bits` bits."""
        mantissa, exponent = math.frexp(factor)
        multiplier = math.floor(mantissa * (1 << multiplier_bits) + 0.5)
        # Beyond 62 bits nothing but the sign is left, and int64 has no more to shift by.
        return cls(multiplier, min(multiplier_bits - exponent, 62), bits)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the codes of x at the new scale."""
        return saturate(round_shift(x * self.multiplier, self.shift), self.bits)
