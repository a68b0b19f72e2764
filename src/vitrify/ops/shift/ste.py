"""Training a shift layer: weights and activations rounded forward, identity backward, one latent weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitrify.ops.shift import reference


class StraightThrough(torch.autograd.Function):
    """decode(quantise(weight)) whose gradient is the weight's own."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, variant: str) -> Tensor:
        """Round; what is not finite becomes NaN, so that a diverged weight shows."""
        exponent = reference.default_exponent(weight, bits, variant)
        level = reference.round_levels(weight, exponent, bits, variant)
        value = reference.decode_levels(level, weight < 0, exponent, bits, variant)
        return value.to(weight.dtype).masked_fill(~weight.isfinite(), float("nan"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Pass the gradient on."""
        return grads[0], None, None


class QuantizedTokens(torch.autograd.Function):
    """values * scale of `reference.quantize_tokens`, in the input's dtype, whose gradient is the input's own."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, kind: str) -> Tensor:
        """Round."""
        values, scale = reference.quantize_tokens(input, kind)
        # A copy: compiled by torch 2.11, a result that a no-op returned has no gradient (pytorch/pytorch#180642).
        return (values.to(scale.dtype) * scale).to(input.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient on."""
        return grads[0], None
