"""Tokens that a router of two experts sends where a test wants them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

PATTERNS = ["first", "second", "alternating", "random"]


def pattern(name: str, tokens: int) -> Tensor:
    """Return the expert of each token, int64."""
    if name == "random":
        return torch.randint(0, 2, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return torch.arange(tokens) % 2 if name == "alternating" else torch.full((tokens,), PATTERNS.index(name))


def routed(
    index: Tensor, width: int, dtype: torch.dtype, *, biased: bool = True
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return random tokens (T, width) and a router (2, width), (2,) of numbers that sends each to its expert."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(index), width, generator=generator)
    weight = torch.randn(2, width, generator=generator) / width**0.5
    bias = torch.randn(2, generator=generator) * biased
    slope = weight[1] - weight[0]
    # Moved along the slope until the second logit is 1 above the first, or 1 below.
    missing = 2 * index - 1 - (x @ slope + bias[1] - bias[0])
    x = x + missing[:, None] * slope / slope.square().sum()
    return x.to(dtype), (weight.to(dtype), bias.to(dtype))


def experts_of(*parameters: Tensor):
    """Return linear experts in float64 from their weights and biases."""
    pairs = zip(parameters[::2], parameters[1::2], strict=True)
    return [partial(F.linear, weight=weight.double(), bias=bias.double()) for weight, bias in pairs]
