"""Fake-quantised integer multiplication: what anyone would try before shifts, and what shifts must be compared with."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops.autocast import without_autocast
from vitrify.ops.shift.validation import has_values

BITS = (4, 8)
ACTIVATION_BITS = 8


class IntLinear(nn.Linear):
    """A linear layer on the values of an integer layer: `bits`-bit weights, 8-bit activations, straight-through.

    Both are symmetric, from the largest magnitude, so that nothing is clipped: one step per output channel of the
    weight, one per token of the input. Values are rounded to the integer grid in float32 and multiplied as floats: the
    integer layer's result up to the rounding of that product. `weight` stays the one latent weight, trained as if
    rounding were not there; parameters and state-dict keys are those of nn.Linear.
    """

    bits: int

    @classmethod
    def adopt_(cls, linear: nn.Linear, bits: int = 8) -> IntLinear:
        """Turn `linear` into an IntLinear in place; Parameters, hooks and mode stay.

        Raises InputError for a width other than 4 and 8, UnsupportedError for a subclass of nn.Linear.
        """
        if bits not in BITS:
            raise InputError(f"bits must be 4 or 8 for an integer weight, not {bits}")
        if type(linear) is not nn.Linear:
            raise UnsupportedError(f"{type(linear).__name__} is not a plain nn.Linear: its own forward would be lost")
        linear.__class__ = cls
        adopted = cast("IntLinear", linear)
        adopted.bits = bits
        return adopted

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), any floating dtype; under autocast as F.linear."""
        weight = fake_quantise(self.weight, self.bits)
        return F.linear(fake_quantise(input, ACTIVATION_BITS), weight, self.bias)

    @torch.no_grad()
    def quantization_error(self) -> float:
        """Return the relative Frobenius error of the weight, |decoded - weight| / |weight|; 0 for a zero weight.

        NaN on meta, where there are no values.
        """
        if not has_values(self.weight):
            return float("nan")
        weight = self.weight.double()
        error = (fake_quantise(weight, self.bits) - weight).norm() / weight.norm().clamp_min(torch.finfo().tiny)
        return float(error)

    def restore_(self) -> nn.Linear:
        """Turn the module back into a plain nn.Linear, in place: the latent weight multiplies again."""
        del self.bits
        self.__class__ = nn.Linear  # type: ignore[assignment]
        return self

    def extra_repr(self) -> str:
        """Add the widths to nn.Linear's description."""
        return f"{super().extra_repr()}, bits={self.bits}, activation_bits={ACTIVATION_BITS}"


def fake_quantise(x: Tensor, bits: int) -> Tensor:
    """Round x (..., C) to `bits`-bit symmetric integers times a step per row of C; straight-through, in x's dtype.

    step = max|row| / (2^(bits-1) - 1), rounding half to even, in float32 (float64 stays) whatever autocast says. A row
    of zeros stays zero.
    """
    with without_autocast(x):
        out: Tensor = _FakeQuantise.apply(x, 2 ** (bits - 1) - 1)
    return out


class _FakeQuantise(torch.autograd.Function):
    """As x + (quantised - x).detach(), without the rounding error of that sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        step = wide.abs().amax(-1, keepdim=True) / levels
        # A step below the smallest number is 0 and leaves nothing to round.
        step = torch.where(step > 0, step, torch.ones_like(step))
        # A copy: compiled by torch 2.11, what a no-op or an in-place operation returns has no gradient
        # (pytorch/pytorch#180642).
        return (wide / step).round_().mul_(step).to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
