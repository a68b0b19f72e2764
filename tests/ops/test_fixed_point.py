"""Rounding, saturation and requantisation against exact rational arithmetic."""

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    scale_for,
)

INTEGERS = st.integers(-(2**40), 2**40)


def half_up(x: Fraction) -> int:
    return floor(x + Fraction(1, 2))


@given(INTEGERS, st.integers(-8, 62))
def test_shifts_round_half_up(x, shift):
    assert round_shift(torch.tensor(x), shift).item() == half_up(Fraction(x) / Fraction(2) ** shift)


@given(INTEGERS, st.integers(1, 2**20))
def test_divisions_round_half_up(x, by):
    for divisor in (by, torch.tensor(by)):
        assert round_divide(torch.tensor(x), divisor).item() == half_up(Fraction(x, by))


@given(st.integers(-(2**24), 2**24), st.floats(2**-40, 2**16), st.integers(2, 24), st.integers(2, 16))
def test_a_requantiser_is_its_own_definition_and_near_the_factor(x, factor, bits, width):
    requantiser = Requantiser.of(factor, bits, width)
    assert 2 ** (width - 1) <= requantiser.multiplier <= 2**width
    real = Fraction(requantiser.multiplier) / Fraction(2) ** requantiser.shift
    low, high = limits(bits)
    assert requantiser(torch.tensor(x)).item() == min(max(half_up(x * real), low), high)
    if requantiser.shift < 62:
        assert abs(real / Fraction(factor) - 1) <= Fraction(1, 2**width)


def test_saturation_and_quantisation_meet_both_ends():
    assert limits(8) == (-128, 127)
    assert saturate(torch.tensor([-1000, -128, 0, 127, 128]), 8).tolist() == [-128, -128, 0, 127, 127]
    codes = quantise(torch.tensor([-9.0, -0.5, -0.25, 0.25, 0.75, 9.0]), 0.5, 4)
    assert codes.tolist() == [-8, -1, 0, 1, 2, 7]
    assert codes.dtype == torch.int64


def test_the_largest_value_becomes_the_largest_code():
    scale = scale_for(3.7, 8)
    assert quantise(torch.tensor([3.7, -3.7]), scale, 8).tolist() == [127, -127]
    assert scale_for(0.0, 8) == 1.0


def test_products_are_exact_beyond_what_float32_holds():
    a = torch.full((1, 4097), 127)
    b = torch.full((4097, 1), 32767)
    assert product(a, b, 40, "a b").item() == 4097 * 127 * 32767


@pytest.mark.parametrize(("value", "bits"), [(127, 8), (128, 9), (-128, 8), (-129, 9), (2**23, 25)])
def test_a_sum_that_does_not_fit_says_how_many_bits_it_takes(value, bits):
    total = torch.tensor([[0, value]])
    assert check_fits(total, bits, "G") is total
    with pytest.raises(InputError, match=rf"^G reaches {bits} bits, but partial sums have {bits - 1}"):
        check_fits(total, bits - 1, "G")
