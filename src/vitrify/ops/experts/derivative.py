"""The derivative of `vitrify::mixture_linear`, and the registered op `vitrify::mixture_gradient` that it needs.

The input's gradient is the same product with the weights transposed, where gathering and scattering swap their roles.
The weights' is, for each expert, the sum over its tokens of outer products: an op of its own, without a derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitrify.errors import UnsupportedError
from vitrify.ops import gpu
from vitrify.ops.experts import aten
from vitrify.ops.experts.registration import LINEAR, kernels_take, mixture_linear_op
from vitrify.ops.shift import reference

GRADIENT = "vitrify::mixture_gradient"

# weights: (trained, C_out, C), of the first expert or of both. biases: (2, C_out). gather, scatter: as in the product.
torch.library.define(
    GRADIENT,
    "(Tensor grad, Tensor x, Tensor order, Tensor counts, bool gather, bool scatter, int trained)"
    " -> (Tensor weights, Tensor biases)",
)


@torch.library.impl(GRADIENT, "default")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return aten.gradient(*arguments)


@torch.library.impl(GRADIENT, "cuda")
def _(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    kernels = gpu.kernels("experts.triton_gradient") if kernels_take(x.device, x.dtype) else aten
    result: tuple[Tensor, Tensor] = kernels.gradient(grad, x, *arguments)
    return result


@torch.library.register_fake(GRADIENT)  # type: ignore[untyped-decorator]
def _(grad: Tensor, x: Tensor, order: Tensor, counts: Tensor, gather: bool, scatter: bool, trained: int) -> Any:
    return x.new_empty(trained, grad.shape[1], x.shape[1]), x.new_empty(2, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, order, counts, weight, _, shift, exponent, _, ctx.bits, ctx.variant, _, ctx.gather, ctx.scatter = inputs
    ctx.save_for_backward(x, order, counts, weight, shift, exponent)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, order, counts, weight, shift, exponent = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = {"weight": needed[3], "bias": needed[4], "shift": needed[5], "shift_bias": needed[7]}
    d_x, found = None, {}
    if needed[0]:
        if exponent is not None:
            shift = reference.decoded(shift, exponent, x.shape[1], ctx.bits, ctx.variant, x.dtype)
        transposed = (weight.t().contiguous(), None, shift.t().contiguous(), None, None, 4, "ps", "float")
        d_x = mixture_linear_op(grad, order, counts, *transposed, ctx.scatter, ctx.gather)
    if any(wanted.values()):
        trained = 2 if wanted["shift"] else 1
        weights, biases = torch.ops.vitrify.mixture_gradient(grad, x, order, counts, ctx.gather, ctx.scatter, trained)
        found = {"weight": weights[0], "bias": biases[0], "shift": weights[-1], "shift_bias": biases[1]}
    d_weight, d_bias, d_shift, d_shift_bias = (found[name] if wanted[name] else None for name in wanted)
    return d_x, None, None, d_weight, d_bias, d_shift, None, d_shift_bias, *[None] * 5


def _no_second_derivative(*_: Any) -> None:
    raise UnsupportedError("grouped experts have no second derivative: use ops.dispatch")


torch.library.register_autograd(LINEAR, _backward, setup_context=_setup_context)
torch.library.register_autograd(GRADIENT, _no_second_derivative)
