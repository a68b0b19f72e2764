"""The registered ops: kernels, shapes for fake tensors, gradients.

`vitrify::shift_linear` is the layer. Its backward, for the input and the bias, is made of plain differentiable calls
and straight-through: quantised activations get the gradient that the float ones would have had.
`vitrify::shift_linear_rounded` is what follows the rounding of the tokens, for graphs that hold the rounding as plain
calls; `vitrify::shift_integer_sums`, on a CPU, only the product in it. Neither has a derivative. `codes` are packed;
`bits` and `variant` say how to read them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrify.errors import UnsupportedError
from vitrify.ops import gpu
from vitrify.ops.shift import cpu, reference

NAME = "vitrify::shift_linear"
ROUNDED = "vitrify::shift_linear_rounded"
SUMS = "vitrify::shift_integer_sums"

torch.library.define(
    NAME,
    "(Tensor input, Tensor codes, Tensor exponent, Tensor? bias, int bits, str variant, str activations) -> Tensor",
)
# values (..., in), int8 or E4M3, and scale (..., 1) are `reference.quantize_tokens`'s; the result is of `dtype`.
torch.library.define(
    ROUNDED,
    "(Tensor values, Tensor scale, Tensor codes, Tensor exponent, Tensor? bias, int bits, str variant,"
    " ScalarType dtype) -> Tensor",
)
torch.library.define(
    SUMS, "(Tensor values, Tensor codes, Tensor exponent, int bits, str variant) -> (Tensor sums, Tensor unit)"
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
    out: Tensor = _kernels(input).linear(input, codes, exponent, bias, bits, variant, activations)
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


@torch.library.impl(ROUNDED, "default")
def _(*arguments: Any) -> Tensor:
    return reference.rounded_linear(*arguments)


@torch.library.impl(ROUNDED, "cpu")
def _(*arguments: Any) -> Tensor:
    return cpu.rounded_linear(*arguments)


@torch.library.impl(ROUNDED, "cuda")
def _(values: Tensor, *arguments: Any) -> Tensor:
    out: Tensor = _kernels(values).rounded_linear(values, *arguments)
    return out


@torch.library.register_fake(ROUNDED)  # type: ignore[untyped-decorator]
def _(
    values: Tensor,
    scale: Tensor,
    codes: Tensor,
    exponent: Tensor,
    bias: Tensor | None,
    bits: int,
    variant: str,
    dtype: torch.dtype,
) -> Tensor:
    return values.new_empty(*values.shape[:-1], codes.shape[0], dtype=dtype)


def _no_derivative(*_: Any) -> None:
    raise UnsupportedError("tokens that are rounded already have no gradient: call shift_linear on the floats")


torch.library.register_autograd(ROUNDED, _no_derivative)


@torch.library.impl(SUMS, "cpu")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return cpu.integer_sums(*arguments)


@torch.library.register_fake(SUMS)  # type: ignore[untyped-decorator]
def _(values: Tensor, codes: Tensor, exponent: Tensor, bits: int, variant: str) -> tuple[Tensor, Tensor]:
    channels = codes.shape[0]
    sums = values.new_empty(*values.shape[:-1], channels, dtype=torch.int32)
    return sums, values.new_empty(channels, dtype=torch.float32)


def shift_linear_op(
    input: Tensor, codes: Tensor, exponent: Tensor, bias: Tensor | None, bits: int, variant: str, activations: str
) -> Tensor:
    """Call the registered op."""
    out: Tensor = torch.ops.vitrify.shift_linear(input, codes, exponent, bias, bits, variant, activations)
    return out


def shift_linear_rounded_op(values: Tensor, scale: Tensor, *arguments: Any) -> Tensor:
    """Call the registered op."""
    out: Tensor = torch.ops.vitrify.shift_linear_rounded(values, scale, *arguments)
    return out


def shift_integer_sums_op(values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Call the registered op."""
    result: tuple[Tensor, Tensor] = torch.ops.vitrify.shift_integer_sums(values, *arguments)
    return result


def _kernels(tensor: Tensor) -> ModuleType:
    return gpu.kernels("shift.triton") if gpu.available(tensor.device) else reference
