"""AdamW with the right parameter groups, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.train.checkpoint import check_keys

# Learned positions, tokens and the gates that conversion adds: pulling them to zero means nothing.
_NO_DECAY = frozenset(
    {
        *("pos_embed", "position_embedding", "position_embeddings", "cls_token", "dist_token", "distillation_token"),
        *("reg_token", "mask_token", "attention_biases", "value_conv", "threshold", "router", "gain", "scale"),
    }
)


def build_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of `model`, fused on CPU and CUDA.

    No decay for one-dimensional parameters (biases, norms, scales), for what `model.no_weight_decay()` names, and for
    any parameter under a module or attribute called pos_embed, cls_token, value_conv, threshold, router, ...
    """
    listed = getattr(model, "no_weight_decay", None)
    exempt: set[str] = set(listed()) if callable(listed) else set()
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_exempt = parameter.ndim <= 1 or name in exempt or not _NO_DECAY.isdisjoint(name.split("."))
        (plain if is_exempt else decayed).append(parameter)
    if not decayed and not plain:
        raise InputError("the model has no trainable parameter: every requires_grad is False")
    device = next(model.parameters()).device.type
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=device in ("cpu", "cuda"))


def state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's state as {"<parameter name>|<state name>": tensor}."""
    return {
        f"{name}|{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `state_tensors` returned; raises InputError if it belongs to other parameters."""
    by_name = dict(model.named_parameters())
    # A parameter that has had no gradient yet has no state: only what was found is compared.
    found = {key.split("|")[0]: value for key, value in tensors.items() if key.endswith("|exp_avg")}
    check_keys("optimizer", {name: p for name, p in by_name.items() if name in found}, found)
    for key, value in tensors.items():
        name, _, field = key.partition("|")
        optimizer.state[by_name[name]][field] = value.to(by_name[name].device)
