"""The registered ops `vitrify::mixture_order` and `vitrify::mixture_linear`: kernels, and shapes for fake tensors.

The product's derivative stands in derivative.py. The order has none: in training the groups come from the choice
that the router's layer made (`grouped.groups_of`), and asking for one is an error, not a wrong number.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vitrify.errors import UnsupportedError
from vitrify.ops import gpu
from vitrify.ops.experts import aten

ORDER = "vitrify::mixture_order"
LINEAR = "vitrify::mixture_linear"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernels of the GPU take; float32 without tensor cores, unless PyTorch may use TF32 itself."""

torch.library.define(ORDER, "(Tensor x, Tensor weight, Tensor? bias) -> (Tensor order, Tensor counts)")
# shift: a weight, or its codes if there are exponents.
torch.library.define(
    LINEAR,
    "(Tensor x, Tensor order, Tensor counts, Tensor weight, Tensor? bias, Tensor shift, Tensor? exponent,"
    " Tensor? shift_bias, int bits, str variant, str activations, bool gather, bool scatter) -> Tensor",
)


@torch.library.impl(ORDER, "default")
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    return aten.order_tokens(*arguments)


@torch.library.impl(ORDER, "cuda")
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _kernels(x).order_tokens(x, *arguments)
    return result


@torch.library.register_fake(ORDER)  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int32), x.new_empty(2, dtype=torch.int32)


@torch.library.impl(LINEAR, "default")
def _(*arguments: Any) -> Tensor:
    return aten.linear(*arguments)


@torch.library.impl(LINEAR, "cuda")
def _(x: Tensor, *arguments: Any) -> Tensor:
    out: Tensor = _kernels(x).linear(x, *arguments)
    return out


@torch.library.register_fake(LINEAR)  # type: ignore[untyped-decorator]
def _(x: Tensor, order: Tensor, counts: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _no_derivative(*_: Any) -> None:
    raise UnsupportedError("the order of tokens has no gradient: route through the router's layer, then groups_of")


torch.library.register_autograd(ORDER, _no_derivative)


def kernels_take(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether the GPU's kernels take tensors on `device` of `dtype`, one of DTYPES."""
    return dtype in DTYPES and gpu.available(device)


def mixture_order_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Call the registered op."""
    result: tuple[Tensor, Tensor] = torch.ops.vitrify.mixture_order(x, weight, bias)
    return result


def mixture_linear_op(x: Tensor, *arguments: Any) -> Tensor:
    """Call the registered op."""
    out: Tensor = torch.ops.vitrify.mixture_linear(x, *arguments)
    return out


def _kernels(x: Tensor) -> ModuleType:
    return gpu.kernels("experts.triton") if kernels_take(x.device, x.dtype) else aten
