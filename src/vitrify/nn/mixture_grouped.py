"""Mixtures of multiply and shift on tokens grouped by expert: each linear layer is one operator for both experts.

So they run on a GPU, one launch per layer, and in compiled graphs of a CPU, which could not cut tensors where the data
says. The experts run as modules, by `dispatch`, wherever that would not give what they give: in a graph that is
exported or traced, for dtypes that the kernels do not take, for other experts, other MLPs than timm's (or one with a
norm, or with parameters in its activation), for parts with hooks, and where dropout is active.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vitrify.nn.shift import ShiftLinear
from vitrify.ops.autocast import under_autocast
from vitrify.ops.experts import Codes, Groups, group_tokens, grouped_linear, groups_of, kernels_take
from vitrify.ops.shift import quantize_tokens_ste, shift_ste
from vitrify.ops.tracing import exporting

if TYPE_CHECKING:
    from vitrify.nn.mixture import Mixture

TIMM_MLP = "timm.layers.mlp.Mlp"


def grouped_forward(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what a deployed mixture makes of x (..., C): its result, and the share of the tokens of each expert (2,).

    None in training mode and with gradients, and where the experts must run as modules.
    """
    if mixture.training or torch.is_grad_enabled() or (layers := _layers(mixture, x)) is None:
        return None
    tokens = x.reshape(-1, x.shape[-1]).to(_dtype(x))
    groups = group_tokens(tokens, *_parameters(mixture.router, tokens.dtype))
    out = _run(mixture, layers, tokens, groups)
    return out.reshape(*x.shape[:-1], out.shape[-1]), groups.counts / len(groups.order)


def grouped_experts(mixture: Mixture, x: Tensor, index: Tensor) -> Tensor | None:
    """Return what the experts that the router chose, index (...), make of x (..., C): (..., C_out), with gradients.

    None where the experts must run as modules.
    """
    if (layers := _layers(mixture, x)) is None:
        return None
    tokens = x.reshape(-1, x.shape[-1]).to(_dtype(x))
    out = _run(mixture, layers, tokens, groups_of(index.reshape(-1)))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def _dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that linear layers compute in: autocast's where that is on, which leaves float64 alone."""
    autocast = under_autocast(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def _run(mixture: Mixture, layers: list[tuple[nn.Linear, ShiftLinear]], tokens: Tensor, groups: Groups) -> Tensor:
    for number, (multiply, shift) in enumerate(layers):
        if number:
            tokens = mixture.act(tokens)  # type: ignore[operator]
        tokens = _linear(tokens, groups, multiply, shift, gather=number == 0, scatter=number == len(layers) - 1)
    return tokens


def _linear(
    tokens: Tensor, groups: Groups, multiply: nn.Linear, shift: ShiftLinear, *, gather: bool, scatter: bool
) -> Tensor:
    weight, bias = _parameters(multiply, tokens.dtype)
    shift_bias = None if shift.bias is None else shift.bias.to(tokens.dtype)
    shifted: Tensor | Codes
    if shift.packed:
        shifted = Codes(shift.codes, shift.exponent, shift.bits, shift.variant, shift.activations)
    else:
        tokens = _rounded(tokens, groups, shift.activations, own_order=gather)
        shifted = shift_ste(shift.weight, shift.bits, shift.variant).to(tokens.dtype)
    return grouped_linear(tokens, groups, weight, bias, shifted, shift_bias, gather=gather, scatter=scatter)


def _rounded(tokens: Tensor, groups: Groups, activations: str, *, own_order: bool) -> Tensor:
    """Round the second expert's tokens as its layer would in training; all are floats, and so is the product."""
    if activations == "float":
        return tokens
    second = torch.arange(tokens.shape[0], device=tokens.device) >= groups.counts[0]
    if own_order:
        second = torch.empty_like(second).scatter_(0, groups.order.long(), second)
    return torch.where(second[:, None], quantize_tokens_ste(tokens, activations), tokens)


def _parameters(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)


def _layers(mixture: Mixture, x: Tensor) -> list[tuple[nn.Linear, ShiftLinear]] | None:
    """Return the linear layers of both experts in the order they run, or None if the experts must run as modules."""
    if mixture.expert_names != ("multiply", "shift") or exporting(x) or not _groups(x):
        return None
    if _dtype(x) != mixture.router.weight.dtype and not under_autocast(x):
        return None
    source, module, shift = mixture.source, cast("Any", mixture), cast("Any", mixture.shift)
    act, between = None, []
    if source is nn.Linear:
        layers = [(module, shift)]
    elif f"{source.__module__}.{source.__qualname__}" == TIMM_MLP:
        layers, act = [(module.fc1, shift.fc1), (module.fc2, shift.fc2)], module.act
        between = [getattr(expert, name) for expert in (module, shift) for name in ("norm", "drop1", "drop2")]
        if [*act.parameters(), *act.buffers()]:
            return None
    else:
        return None
    for multiply, coded in layers:
        plain = multiply is module or type(multiply) is nn.Linear
        if not plain or type(coded) is not ShiftLinear:
            return None
    passed_by = [child for child in mixture.modules() if child is not mixture and child is not act]
    hooked = any(child._forward_hooks or child._forward_pre_hooks for child in passed_by)
    return layers if not hooked and all(_inert(child) for child in between) else None


def _groups(x: Tensor) -> bool:
    return kernels_take(x.device, _dtype(x)) or (x.device.type == "cpu" and torch.compiler.is_compiling())


def _inert(module: nn.Module) -> bool:
    """Say whether the module changes nothing: an identity, or dropout that is off or drops nothing."""
    return type(module) is nn.Identity or (type(module) is nn.Dropout and not (module.training and module.p > 0))
