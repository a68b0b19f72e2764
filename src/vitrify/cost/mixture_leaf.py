"""A mixture in a trace: its router, and each expert on its own tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vitrify.cost.trace import Tracer
from vitrify.errors import InputError
from vitrify.nn import Mixture
from vitrify.ops.experts import route


def shares(model: nn.Module, split: Mapping[str, float] | None) -> dict[str, list[float]]:
    """Return the share of the tokens that each expert of each mixture gets, by the mixture's name.

    As stated by `split`; else as measured by the mixture's last forward; else inversely to the latencies `alpha`, which
    is where the balancing losses lead. Raises InputError for a split that names other experts or is no distribution.
    """
    found: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Mixture):
            continue
        if split is not None:
            found[name] = _stated(split, module)
            continue
        measured = [] if module.share.is_meta else module.share.tolist()
        if measured and all(math.isfinite(part) for part in measured):
            found[name] = measured
        else:
            speeds = [1 / latency for latency in module.alpha]
            found[name] = [speed / sum(speeds) for speed in speeds]
    return found


def _stated(split: Mapping[str, float], module: Mixture) -> list[float]:
    if set(split) != set(module.expert_names):
        raise InputError(f"split names {sorted(split)}, but the experts are {sorted(module.expert_names)}")
    parts = [split[name] for name in module.expert_names]
    if not all(part >= 0 for part in parts) or not math.isclose(sum(parts), 1, abs_tol=1e-6):
        raise InputError(f"split must be shares of at least 0 that sum to 1, not {dict(split)}")
    return parts


def tokens_of(shares: Sequence[float], tokens: int) -> list[int]:
    """Return whole numbers of tokens in those shares that sum to `tokens`: the largest remainders are rounded up.

    >>> tokens_of([0.4, 0.6], 197)
    [79, 118]
    """
    exact = [share * tokens for share in shares]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: tokens - sum(counts)]:
        counts[index] += 1
    return counts


def mixture(tracer: Tracer, module: Mixture, share: Sequence[float], input: Tensor) -> Tensor:
    """Route, gather each expert's tokens, run it on them, put the rows back; an expert without tokens does not run."""
    logits = module.router(input)
    index, _ = route(logits)
    g = tracer.builder
    tokens = input.numel() // input.shape[-1]
    counts = tokens_of(share, tokens)
    with tracer.paused():
        gathered = input.new_empty(tokens, input.shape[-1])
        order = input.new_empty(tokens, dtype=torch.int64)
        parts = torch.split(gathered, counts)
    # Sorting the tokens by expert: with as many bins as experts, one comparison a token.
    places = g.vector("compare", [tracer.operand(index)], (tokens,))
    tracer.bind(order, places)
    tracer.bind(gathered, g.vector("move", [tracer.operand(input), places], gathered.shape))
    experts = [expert(part) for expert, part in zip(module.experts().values(), parts, strict=True) if len(part)]
    out = torch.cat(experts).index_select(0, order)
    return out.reshape(*input.shape[:-1], out.shape[-1])
