"""The deployed path of mixtures on a GPU: tokens grouped by expert, each linear layer one launch for both experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vitrify.nn.shift import ShiftLinear
from vitrify.ops.autocast import under_autocast
from vitrify.ops.experts import Codes, Groups, group_tokens, grouped_linear, kernels_take
from vitrify.ops.shift import shift_ste
from vitrify.ops.tracing import exporting

if TYPE_CHECKING:
    from vitrify.nn.mixture import Mixture

TIMM_MLP = "timm.layers.mlp.Mlp"


def grouped_forward(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return what a deployed mixture makes of x (..., C): its result, and the share of the tokens of each expert (2,).

    None where the experts must run as modules: in training or with gradients, in a graph that is exported or traced, on
    devices and dtypes that the kernels do not take, for other experts than multiply and shift, quantised activations,
    other MLPs than timm's (or one with a norm, or with parameters in its activation), and for parts with hooks, or in
    training mode, as dropout for Monte Carlo estimates.
    """
    if mixture.training or torch.is_grad_enabled() or exporting(x):
        return None
    cast_to = torch.get_autocast_dtype(x.device.type) if under_autocast(x) else None
    dtype = cast_to or x.dtype
    if not kernels_take(x.device, dtype) or x.dtype == torch.float64:
        return None
    layers = _layers(mixture)
    if layers is None or (cast_to is None and mixture.router.weight.dtype != dtype):
        return None
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    groups = group_tokens(tokens, *_parameters(mixture.router, dtype))
    for number, (multiply, shift) in enumerate(layers):
        if number:
            tokens = mixture.act(tokens)  # type: ignore[operator]
        tokens = _linear(tokens, groups, multiply, shift, gather=number == 0, scatter=number == len(layers) - 1)
    return tokens.reshape(*x.shape[:-1], tokens.shape[-1]), groups.counts / len(groups.order)


def _linear(
    tokens: Tensor, groups: Groups, multiply: nn.Linear, shift: ShiftLinear, *, gather: bool, scatter: bool
) -> Tensor:
    weight, bias = _parameters(multiply, tokens.dtype)
    shift_bias = None if shift.bias is None else shift.bias.to(tokens.dtype)
    shifted: Tensor | Codes
    if shift.packed:
        shifted = Codes(shift.codes, shift.exponent, shift.bits, shift.variant, shift.activations)
    else:
        shifted = shift_ste(shift.weight, shift.bits, shift.variant).to(tokens.dtype)
    return grouped_linear(tokens, groups, weight, bias, shifted, shift_bias, gather=gather, scatter=scatter)


def _parameters(linear: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)


def _layers(mixture: Mixture) -> list[tuple[nn.Linear, ShiftLinear]] | None:
    """Return the linear layers of both experts in the order they run, or None if anything else happens between."""
    if mixture.expert_names != ("multiply", "shift"):
        return None
    source, module, shift = mixture.source, cast("Any", mixture), cast("Any", mixture.shift)
    act = None
    if source is nn.Linear:
        layers = [(module, shift)]
    elif f"{source.__module__}.{source.__qualname__}" == TIMM_MLP:
        layers, act = [(module.fc1, shift.fc1), (module.fc2, shift.fc2)], module.act
        stateful = [*act.parameters(), *act.buffers()]
        if stateful or any(type(part) is not nn.Identity for part in (module.norm, shift.norm)):
            return None
    else:
        return None
    for multiply, coded in layers:
        plain = multiply is module or type(multiply) is nn.Linear
        if not plain or type(coded) is not ShiftLinear or not (coded.packed or coded.activations == "float"):
            return None
    passed_by = [child for child in mixture.modules() if child is not mixture and child is not act]
    if any(child._forward_hooks or child._forward_pre_hooks or child.training for child in passed_by):
        return None
    return layers
