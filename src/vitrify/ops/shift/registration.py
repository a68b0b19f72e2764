"""The registered op `vitrify::shift_linear`: kernel, shapes for fake tensors, gradients for the input and the bias.

`codes` are packed; `bits` and `variant` say how to read them. The backward is made of plain differentiable calls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.ops.shift import packing, reference

NAME = "vitrify::shift_linear"

torch.library.define(
    NAME, "(Tensor input, Tensor codes, Tensor exponent, Tensor? bias, int bits, str variant) -> Tensor"
)


def decoded(codes: Tensor, exponent: Tensor, width: int, bits: int, variant: str, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, width) of packed codes in `dtype`."""
    # int32 before the bits are taken apart: torch's ONNX export gives uint8 and a number different types.
    return reference.decode(packing.unpack(codes.int(), width, bits), exponent, bits, variant).to(dtype)


def linear(input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str) -> Tensor:
    """Return F.linear(input, decoded codes, bias): the kernel without a faster one, and what an export holds."""
    return F.linear(input, decoded(codes, exponent, input.shape[-1], bits, variant, input.dtype), bias)


@torch.library.impl(NAME, "default")
def _(input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str) -> Tensor:
    return linear(input, codes, exponent, bias, bits, variant)


@torch.library.register_fake(NAME)  # type: ignore[untyped-decorator]
def _(input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str) -> Tensor:
    return input.new_empty(*input.shape[:-1], codes.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, codes, exponent, _, ctx.bits, ctx.variant = inputs
    ctx.width = input.shape[-1]
    ctx.save_for_backward(codes, exponent)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
    codes, exponent = ctx.saved_tensors
    d_input = d_bias = None
    if ctx.needs_input_grad[0]:
        d_input = grad @ decoded(codes, exponent, ctx.width, ctx.bits, ctx.variant, grad.dtype)
    if ctx.needs_input_grad[3]:
        d_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return d_input, None, None, d_bias, None, None


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context)


def shift_linear_op(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str
) -> Tensor:
    """Call the registered op."""
    out: Tensor = torch.ops.vitrify.shift_linear(input, codes, exponent, bias, bits, variant)
    return out
