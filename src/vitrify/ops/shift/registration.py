"""The registered op `vitrify::shift_linear`: kernels, shapes for fake tensors, gradients for the input and the bias.

`codes` are packed; `bits` and `variant` say how to read them. The backward is made of plain differentiable calls and
is straight-through: quantised activations get the gradient that the float ones would have had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitrify.ops import gpu
from vitrify.ops.shift import cpu, reference

NAME = "vitrify::shift_linear"

torch.library.define(
    NAME,
    "(Tensor input, Tensor codes, Tensor exponent, Tensor? bias, int bits, str variant, str activations) -> Tensor",
)


@torch.library.impl(NAME, "default")
def _(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    return reference.linear(input, codes, exponent, bias, bits, variant, activations)


@torch.library.impl(NAME, "cpu")
def _(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    return cpu.linear(input, codes, exponent, bias, bits, variant, activations)


@torch.library.impl(NAME, "cuda")
def _(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    kernels = gpu.kernels("shift.triton") if gpu.available(input.device) else reference
    out: Tensor = kernels.linear(input, codes, exponent, bias, bits, variant, activations)
    return out


@torch.library.register_fake(NAME)  # type: ignore[untyped-decorator]
def _(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    return input.new_empty(*input.shape[:-1], codes.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, exponent, _, ctx.bits, ctx.variant, _ = inputs
    ctx.width = input.shape[-1]
    ctx.save_for_backward(codes, exponent)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None, None]:
    codes, exponent = ctx.saved_tensors
    d_input = d_bias = None
    if ctx.needs_input_grad[0]:
        d_input = grad @ reference.decoded(codes, exponent, ctx.width, ctx.bits, ctx.variant, grad.dtype)
    if ctx.needs_input_grad[3]:
        d_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return d_input, None, None, d_bias, None, None, None


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context)


def shift_linear_op(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    """Call the registered op."""
    out: Tensor = torch.ops.vitrify.shift_linear(input, codes, exponent, bias, bits, variant, activations)
    return out
