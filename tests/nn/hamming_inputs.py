"""Inputs and cores for the tests of the Hamming core."""

from __future__ import annotations

import torch
from torch import nn

from vitrify.nn import Hamming

SCALE = 0.35


def tensors(queries=7, keys=7, *, dtype=torch.float64, seed=0, images=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, 8), (keys, 8), (keys, 5)
    return [torch.randn(images, 3, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def core(form="published", *, dtype=torch.float64, **options):
    """Return a core for 3 heads of 8 channels, its parameters drawn at random."""
    made = Hamming(3, 8, form=form, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.3, 0.2, generator=generator)
    return made


def padding():
    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    keep[0, ..., 4:] = False
    return keep


def codes_of(module, q, k):
    return module.query_binariser(q), (module.key_binariser or module.query_binariser)(k)
