"""Against DeepShift's two roundings, stated here from its formulas: W = sign 2^P with one scale for all weights.

PS: P = clamp(round(log2|w|), -14, 0) at 5 bits, sign = round(sign parameter) in {-1, 0, 1}; initialised from weights,
the sign parameter is sign(w). Q: one weight, P = clamp(round(log2|w|), -15, 0), sign = sign(w).

Where ours differ, on purpose:
- a power-of-two scale per output channel; with exponent 0 in every channel the ranges of P are the same;
- "ps": a weight that rounds below the lowest power becomes 0 (DeepShift's P stops at -14, and only its trained sign
  makes zeros);
- "q": an exact 0 becomes the lowest power (DeepShift's sign(0) keeps it 0, a value its codes have no room for).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitrify.nn import ShiftLinear
from vitrify.ops import shift_decode, shift_quantize, shift_ste


def powers(weight: np.ndarray, lowest: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.clip(np.round(np.log2(np.abs(weight))), lowest, 0)


def deepshift_ps(weight: np.ndarray, bits: int) -> np.ndarray:
    return np.sign(weight) * 2.0 ** powers(weight, -(2 ** (bits - 1) - 2))


def deepshift_q(weight: np.ndarray, bits: int) -> np.ndarray:
    return np.sign(weight) * 2.0 ** powers(weight, -(2 ** (bits - 1) - 1))


def random_weights(spread: float) -> np.ndarray:
    """Return weights up to about 1 whose logarithms reach 2^-spread."""
    rng = np.random.default_rng(0)
    return rng.choice([-1.0, 1.0], (40, 100)) * 2.0 ** rng.uniform(-spread, 0.4, (40, 100))


ZEROS = torch.zeros(40, dtype=torch.int8)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_q_is_deepshift_q(bits):
    weight = random_weights(spread=40)
    ours = shift_decode(*shift_quantize(torch.from_numpy(weight), bits, "q", ZEROS), bits, "q", torch.float64)
    np.testing.assert_array_equal(ours.numpy(), deepshift_q(weight, bits))


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
def test_ps_is_deepshift_ps_but_for_small_weights(bits):
    weight = random_weights(spread=40)
    ours = shift_decode(*shift_quantize(torch.from_numpy(weight), bits, "ps", ZEROS), bits, "ps", torch.float64)
    small = np.round(np.log2(np.abs(weight))) < -(2 ** (bits - 1) - 2)
    assert small.any()
    np.testing.assert_array_equal(ours.numpy()[~small], deepshift_ps(weight, bits)[~small])
    assert (ours.numpy()[small] == 0).all()


def test_the_ranges_at_5_bits_are_the_papers():
    weight = np.array([[2.0**-p for p in range(20)]])
    for rounding, variant, lowest in ((deepshift_ps, "ps", -14), (deepshift_q, "q", -15)):
        assert rounding(weight, 5).min() == 2.0**lowest
        ours = shift_decode(*shift_quantize(torch.from_numpy(weight), 5, variant), 5, variant, torch.float64)
        assert ours[ours > 0].min() == 2.0**lowest


def test_zero_is_where_q_differs():
    weight = np.array([[0.0, 1.0]])
    ours = shift_decode(*shift_quantize(torch.from_numpy(weight), 5, "q"), 5, "q", torch.float64)
    assert deepshift_q(weight, 5).tolist() == [[0.0, 1.0]]
    assert ours.tolist() == [[2.0**-15, 1.0]]


@pytest.mark.parametrize(("variant", "peer"), [("ps", deepshift_ps), ("q", deepshift_q)])
def test_a_shift_layer_with_a_scale_is_deepshift_on_scaled_rows(variant, peer):
    """Scaling each row so that its largest weight rounds to 1 makes a per-channel format DeepShift's."""
    weight = np.random.default_rng(1).normal(0, 0.05, (8, 64)).astype(np.float32)
    linear = torch.nn.Linear(64, 8)
    linear.weight.data.copy_(torch.from_numpy(weight))
    shift, _ = ShiftLinear.from_linear(linear, bits=5, variant=variant)
    scale = 2.0 ** np.round(np.log2(np.abs(weight).max(1, keepdims=True)))
    expected = peer(weight.astype(np.float64) / scale, 5) * scale  # 64 normal weights: none is as small as 2^-14.5
    np.testing.assert_array_equal(shift.decoded_weight().numpy(), expected)


def test_gradients_are_straight_through_in_both():
    weight = torch.from_numpy(random_weights(spread=3)).requires_grad_()
    (grad,) = torch.autograd.grad((shift_ste(weight, 5, "q") * 3).sum(), weight)
    assert (grad == 3).all()
