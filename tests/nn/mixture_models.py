"""Small mixtures with fixed weights, and inputs for them."""

import pytest
import timm.layers
import torch
from torch import nn

from vitrify.nn import MixtureLinear, mixture_mlp_
from vitrify.ops import dispatch, route


class Mlp(nn.Module):
    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def seeded(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear():
    return seeded(nn.Linear(8, 6))


def mixture_linear(**settings):
    return MixtureLinear.adopt_(linear(), **settings)


def mixture_mlp(**settings):
    return mixture_mlp_(seeded(Mlp()), **settings)


def timm_mlp(kind=timm.layers.Mlp, activations="float", **settings):
    return mixture_mlp_(seeded(kind(8, 12, **settings)), activations=activations)


def by_modules(mixture, x):
    """What the mixture makes of x, its experts called as modules."""
    index, gate = route(mixture.router(x))
    out = dispatch(x, index, list(mixture.experts().values()))
    return out * gate.unsqueeze(-1).to(out.dtype)


BOTH = pytest.mark.parametrize("make", [mixture_linear, mixture_mlp])
