"""vitrify's own modules in a trace: what they compute when deployed, not how PyTorch imitates it.

A shift layer rounds its weight at each forward in PyTorch; deployed it holds codes. Codes are floats in PyTorch, and
bits in the graph. A mixture runs every expert on tensors without values, and each on its own tokens in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.cost import attention_leaves
from vitrify.cost.aten import convolution
from vitrify.cost.graph import Operand, Primitive
from vitrify.cost.mixture_leaf import mixture, shares
from vitrify.cost.tensors import bits_of, numel
from vitrify.cost.trace import Tracer
from vitrify.nn import Hamming, IntLinear, Mixture, ShiftConv2d, ShiftLinear, Taylor, TaylorSparse
from vitrify.nn.binarise import Binariser
from vitrify.nn.integer import ACTIVATION_BITS

Leaf = Callable[..., Tensor]


def install(
    tracer: Tracer, model: nn.Module, source: nn.Module, taylor: str, split: Mapping[str, float] | None
) -> None:
    """Replace the forward of each of our modules in `model`, the tracer's copy of `source`; arguments as `workload`'s.

    Raises InputError for a split that does not fit the mixtures.
    """
    given = shares(source, split)
    for name, module in model.named_modules():
        forward: Leaf | None = None
        if isinstance(module, Mixture):
            forward = partial(mixture, tracer, module, given[name])
        elif isinstance(module, (ShiftLinear, ShiftConv2d)):
            forward = partial(shift, tracer, module, name)
        elif isinstance(module, IntLinear):
            forward = partial(integer, tracer, module)
        elif isinstance(module, Binariser):
            forward = partial(attention_leaves.binariser, tracer, module)
        elif isinstance(module, TaylorSparse) and not module.low_rank:
            forward = partial(attention_leaves.sparse, tracer, module, module.forward)
        elif isinstance(module, Taylor):
            forward = partial(attention_leaves.taylor, tracer, module, module.forward, taylor)
        elif isinstance(module, Hamming):
            forward = partial(attention_leaves.hamming, tracer, module, module.forward)
        if forward is not None:
            module.forward = forward


def shift(tracer: Tracer, module: ShiftLinear | ShiftConv2d, name: str, input: Tensor) -> Tensor:
    """Products by shifting; the weight is `bits` wide, and an int8 exponent per output channel scales it.

    With 8-bit activations the tokens are rounded first, and their steps scale the results.
    """
    g, x = tracer.builder, tracer.operand(input)
    shape = module._weight_shape()
    holds = "codes" if module.packed else "weight"
    codes = Operand(f"{name}.{holds}", shape, module.bits, "weight")
    weights = codes, Operand(f"{name}.exponent", shape[:1], 8, "weight")
    with tracer.paused():
        blank = input.new_empty(shape)
        if isinstance(module, ShiftConv2d):
            out = module._conv_forward(input, blank, module.bias)
        else:
            out = F.linear(input, blank, module.bias)
    bias = None if module.bias is None else tracer.operand(module.bias)
    if isinstance(module, ShiftLinear) and module.activations != "float":
        rounded, peak = round_tokens(tracer, x)
        bits = (ACTIVATION_BITS, module.bits, 32)
        with g.kernel():
            sums = linear(tracer, rounded, weights, None, out, primitive="shift", bits=bits)
            result = g.vector("mul", [sums, peak], out.shape, bits=bits_of(out))
            if bias is not None:
                result = g.vector("add", [result, bias], out.shape, bits=bits_of(out))
        return tracer.bind(out, result)
    with g.kernel():
        if isinstance(module, ShiftConv2d):
            result = convolution(g, x, weights, bias, tuple(out.shape), module.groups, primitive="shift")
        else:
            result = linear(tracer, x, weights, bias, out, primitive="shift")
    return tracer.bind(out, result)


def integer(tracer: Tracer, module: IntLinear, input: Tensor) -> Tensor:
    """An integer layer: find each token's largest magnitude and divide, multiply 8 x `bits` bits, scale the sums back.

    Scaling back is two products per output: by the token's step and by the channel's.
    """
    g, x = tracer.builder, tracer.operand(input)
    with tracer.paused():
        out = F.linear(input, module.weight, module.bias)
    latent = tracer.operand(module.weight)
    weight = Operand(latent.tensor, latent.shape, module.bits, "weight")
    steps = Operand(f"{latent.tensor}.step", latent.shape[:1], bits_of(input), "weight")
    rounded, peak = round_tokens(tracer, x)
    with g.kernel():
        sums = linear(
            tracer, rounded, (weight,), None, out, primitive="multiply", bits=(ACTIVATION_BITS, module.bits, 32)
        )
        scaled = g.vector("mul", [sums, peak], out.shape, bits=bits_of(out))
        result = g.vector("mul", [scaled, steps], out.shape, bits=bits_of(out))
        if module.bias is not None:
            result = g.vector("add", [result, tracer.operand(module.bias)], out.shape, bits=bits_of(out))
    return tracer.bind(out, result)


def round_tokens(tracer: Tracer, x: Operand) -> tuple[Operand, Operand]:
    """Append the rounding of each token to 8 bits, and return the result and the tokens' largest magnitudes."""
    g, rows = tracer.builder, (*x.shape[:-1], 1)
    with g.kernel():
        peak = g.vector("compare", [x], rows, numel(x.shape))
        inverse = g.vector("div", [peak], rows)
        return g.vector("mul", [x, inverse], x.shape, bits=ACTIVATION_BITS), peak


def linear(
    tracer: Tracer,
    x: Operand,
    weights: tuple[Operand, ...],
    bias: Operand | None,
    out: Tensor,
    *,
    primitive: Primitive,
    bits: tuple[int, int, int] | None = None,
) -> Operand:
    """A linear layer over all leading dimensions; weights[0] is (out, in), as nn.Linear holds it."""
    g = tracer.builder
    n, k = weights[0].shape
    sizes = out.numel() // n, k, n
    out_bits = bits_of(out) if bits is None else bits[2]
    result = g.matmul((x, *weights), sizes, out.shape, primitive=primitive, bits=bits, out_bits=out_bits)
    return result if bias is None else g.vector("add", [result, bias], out.shape)
