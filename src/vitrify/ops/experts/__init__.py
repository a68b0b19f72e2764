"""A mixture of primitives (ShiftAddViT): each token runs through the one expert that a router picks. See README.md."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vitrify.errors import InputError
from vitrify.ops.experts import derivative as _derivative  # noqa: F401  (registers itself)
from vitrify.ops.experts.balance import LOADS, balance_losses, check_alpha
from vitrify.ops.experts.grouped import Codes, Groups, group_tokens, grouped_linear, groups_of
from vitrify.ops.experts.reference import Expert, dense
from vitrify.ops.experts.registration import kernels_take
from vitrify.ops.tracing import exporting, fx_leaf

__all__ = [
    "LOADS",
    "Codes",
    "Expert",
    "Groups",
    "balance_losses",
    "check_alpha",
    "dense",
    "dispatch",
    "group_tokens",
    "grouped_linear",
    "groups_of",
    "kernels_take",
    "route",
]


@fx_leaf
def route(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Pick each token's most probable expert: logits (..., E) -> index int64 (...), gate (...).

    gate = p / stopgrad(p) of the picked expert, p = softmax(logits) in float32 (float64 stays): exactly 1, with the
    gradient of log p. An output times the gate is unchanged, and yet the router learns from it. Ties go to the first.
    """
    wide = logits.dtype if logits.dtype == torch.float64 else torch.float32
    p, index = logits.softmax(-1, dtype=wide).max(-1)
    # p / p is 1 to the last bit only where division is; p - p is 0 on every device.
    return index, 1 + (p - p.detach()) / p.detach()


def dispatch(x: Tensor, index: Tensor, experts: Sequence[Expert]) -> Tensor:
    """Run each token through its own expert only: x (T, C), index int (T,) in 0..E-1 -> (T, C_out).

    Leading dimensions may be more than one: (..., C) with index (...). Each expert is called once, on its tokens as
    (T_e, C) in their order, T_e = 0 included (so that its parameters get a gradient, which DDP waits for), and returns
    (T_e, C_out). Experts must treat every token by itself. Reading the T_e stops a GPU once per call.
    A graph that is compiled, exported or traced, and meta and fake tensors, cannot have shapes that depend on the data:
    there every expert runs on every token and the right rows are selected, which gives the same result and saves
    nothing.

    Raises InputError for shapes that do not match and for an index without an expert (the latter only when gathered).
    """
    if _symbolic(x):
        return dense(x, index, experts)
    if x.dim() < 1 or index.shape != x.shape[:-1]:
        raise InputError(f"index {tuple(index.shape)} must have one entry per token of x {tuple(x.shape)}")
    chosen = index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=len(experts)).tolist()
    if len(counts) > len(experts):
        raise InputError(f"index {len(counts) - 1} names no expert: there are {len(experts)}, counted from 0")
    tokens = x.reshape(-1, x.shape[-1])
    run = _run_for_gradients if torch.is_grad_enabled() else _run_in_place
    out = run(tokens, order, counts, experts)
    return out.reshape(*index.shape, out.shape[-1])


def _run_for_gradients(tokens: Tensor, order: Tensor, counts: list[int], experts: Sequence[Expert]) -> Tensor:
    # One gather before and one after: the backward of rows written in place would copy the whole once per expert.
    parts = torch.split(tokens.index_select(0, order), counts)
    out = torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
    places = torch.arange(len(order), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, places)
    return out.index_select(0, inverse)


def _run_in_place(tokens: Tensor, order: Tensor, counts: list[int], experts: Sequence[Expert]) -> Tensor:
    # Every result goes to its rows at once: one copy of the whole less, and each part is still in the cache.
    groups = torch.split(order, counts)
    first = experts[0](tokens.index_select(0, groups[0]))
    out = first.new_empty(len(tokens), first.shape[-1]).index_copy_(0, groups[0], first)
    for expert, rows in zip(experts[1:], groups[1:], strict=True):
        out.index_copy_(0, rows, expert(tokens.index_select(0, rows)))
    return out


def _symbolic(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or exporting(x) or x.is_meta or isinstance(x, FakeTensor)
