"""ShiftAddViT's latency-aware load-balancing losses (docs/papers.md, ShiftAddViT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.errors import InputError, unknown

LOADS = ("hard", "smooth")


def balance_losses(
    p: Tensor, alpha: Sequence[float], noise: float | None = None, *, load: str = "hard"
) -> tuple[Tensor, Tensor]:
    """Return (importance, load), two scalars that are 0 when every expert gets tokens in proportion to 1 / latency.

        importance = SCV({alpha_i sum_x p_i(x)}),  load = SCV({alpha_i sum_x q_i(x)}),  SCV(v) = Var(v) / Mean(v)^2
        q_i(x) = P(p_i(x) + eps >= max_{j != i} p_j(x)),  eps ~ N(0, noise^2), in closed form

    p: (T, E) routing probabilities, T >= 1, float32 | float64. alpha: a latency per expert in any unit (SCV has no
    scale). noise: 1 / E by default, as published. Var is the population variance.

    `load` says what is summed. "smooth": p and q themselves, as published; p = 0.437 for every token then nearly
    satisfies both losses while no token goes to the first expert. "hard": the tokens that are really dispatched, one
    or zero each, with the gradients of p and q. Both sums must be hard: an importance of soft sums goes on pulling at
    the router until its probabilities have spread, and holds 6:4 at 35 % instead of 40 % (numbers in README.md).

    Raises InputError for shapes and numbers that do not fit. ShiftAddViT (NeurIPS 2023); docs/papers.md.
    """
    _check(p, alpha, noise)
    num_experts = p.shape[1]
    q = _smooth_choice(p, 1 / num_experts if noise is None else noise)
    if load == "hard":
        chosen = F.one_hot(p.argmax(1), num_experts)
        p, q = (soft + (chosen - soft).detach() for soft in (p, q))
    elif load != "smooth":
        raise unknown("load", load, LOADS)
    return _scv(p.sum(0), alpha), _scv(q.sum(0), alpha)


def _smooth_choice(p: Tensor, noise: float) -> Tensor:
    """Return q (T, E): the probability that an expert beats the best of the others when its p is shaken by `noise`."""
    itself = torch.eye(p.shape[1], dtype=torch.bool, device=p.device)
    rival = p.unsqueeze(1).masked_fill(itself, -1).amax(2)
    q: Tensor = torch.special.ndtr((p - rival) / noise)
    return q


def _scv(sums: Tensor, alpha: Sequence[float]) -> Tensor:
    # One number at a time: a tensor of them would be copied to a GPU, which waits for that.
    values = torch.stack([factor * value for factor, value in zip(alpha, sums.unbind(), strict=True)])
    return values.var(correction=0) / values.mean().square()


def _check(p: Tensor, alpha: Sequence[float], noise: float | None) -> None:
    if p.dim() != 2 or p.shape[1] < 2:
        raise InputError(f"p must be (tokens, experts) with at least two experts, not {tuple(p.shape)}")
    if p.dtype not in (torch.float32, torch.float64):
        raise InputError(f"p must be float32 or float64, not {p.dtype}: sums over tokens need the digits")
    check_alpha(alpha, p.shape[1])
    if noise is not None and not noise > 0:
        raise InputError(f"noise is a standard deviation, so positive, not {noise}")


def check_alpha(alpha: Sequence[float], num_experts: int) -> None:
    """Raise InputError unless `alpha` holds a positive, finite latency for every expert."""
    if len(alpha) != num_experts:
        raise InputError(f"alpha {tuple(alpha)} has {len(alpha)} latencies for {num_experts} experts: one each")
    if not all(0 < value < float("inf") for value in alpha):
        raise InputError(f"alpha {tuple(alpha)}: latencies must be positive and finite")
