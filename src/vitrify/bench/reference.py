"""Dense attention in float64, on sampled query rows (for gradients: sampled heads): what outputs are held against.

Written here again from the definitions, not taken from `vitrify.ops`: a mistake there must not vouch for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrify.bench.registry import Check

MAX_ROWS = 256
Kind = Literal["softmax", "taylor", "sums"]


def sample_rows(num_queries: int, device: torch.device) -> Tensor:
    """Return the query rows to compare: all of them, or `MAX_ROWS` spread from the first to the last."""
    count = min(num_queries, MAX_ROWS)
    return torch.linspace(0, num_queries - 1, count, device=device).round().long()


def dense_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float, kind: Kind) -> Tensor:
    """Evaluate attention through its full weight matrix, in the inputs' own dtype.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, heads, keys, head_dim).
        value: (batch, heads, keys, value_dim).
        scale: what the scores are multiplied by.
        kind: "softmax", "taylor": weights (1 + scale q.k^) / keys, keys centred over the tokens (docs/papers.md 1), or
            "sums": the products q.k themselves are the weights, as among codes.

    Returns:
        (batch, heads, queries, value_dim).
    """
    if kind == "softmax":
        return (query @ key.mT * scale).softmax(dim=-1) @ value
    if kind == "sums":
        return query @ key.mT @ value
    centred = key - key.mean(dim=-2, keepdim=True)
    return (1 + query @ centred.mT * scale) / key.shape[-2] @ value


def check_attention(output: Tensor, query: Tensor, key: Tensor, value: Tensor, *, scale: float, kind: Kind) -> Check:
    """Compare `output` (batch, heads, queries, value_dim) with the float64 definition.

    The allowed error is twice what plain PyTorch, in the inputs' dtype, loses on the same rows, plus an epsilon band:
    a fast kernel may round differently, not worse. Any NaN or infinity in the whole output fails.
    """
    rows = sample_rows(query.shape[-2], query.device)
    picked = query[..., rows, :]
    exact = dense_attention(picked.double(), key.double(), value.double(), scale=scale, kind=kind)
    plain = dense_attention(picked, key, value, scale=scale, kind=kind)
    largest = exact.abs().max().item()
    tolerance = 2 * _error(plain, exact) / largest + 8 * torch.finfo(query.dtype).eps
    error = _error(output[..., rows, :], exact) / largest if bool(output.isfinite().all()) else float("nan")
    return Check(error, tolerance, f"float64 {kind} attention, {len(rows)} of {query.shape[-2]} query rows")


MAX_WEIGHTS, CHUNK = 2**26, 1024
"""Attention weights whose gradient is compared (more where one head has more), query rows that are held at a time."""


def check_gradients(
    gradients: Sequence[Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
    *,
    scale: float,
    kind: Kind,
) -> Check:
    """Compare the gradients of query, key and value, given the result's, `upstream`, with float64's.

    All are (batch, heads, tokens, width). Each gradient of a key sums over all queries, so no rows are sampled but
    whole heads: as many as have `MAX_WEIGHTS` weights together, at least the first and the last. The allowed error is
    that of `check_attention`, beside the largest value of all three (over one token, softmax's others are 0). The
    worst of the three is returned.
    """
    heads = query.shape[0] * query.shape[1]
    count = min(heads, max(2, MAX_WEIGHTS // (query.shape[-2] * key.shape[-2])))
    picked = torch.linspace(0, heads - 1, count, device=query.device).round().long()
    inputs = [tensor.flatten(0, 1)[picked] for tensor in (query, key, value, upstream)]
    exact = _dense_gradients(*(tensor.double() for tensor in inputs), scale=scale, kind=kind)
    plain = _dense_gradients(*inputs, scale=scale, kind=kind)
    largest = max(gradient.abs().max().item() for gradient in exact)
    checks = []
    for name, own, right, rounded in zip(("query", "key", "value"), gradients, exact, plain, strict=True):
        tolerance = 2 * _error(rounded, right) / largest + 8 * torch.finfo(query.dtype).eps
        finite = bool(own.isfinite().all())
        error = _error(own.flatten(0, 1)[picked], right) / largest if finite else float("inf")
        checks.append(Check(error, tolerance, f"float64 {kind} gradient of the {name}, {count} of {heads} heads"))
    return max(checks, key=lambda check: check.error / check.tolerance)


def _dense_gradients(
    query: Tensor, key: Tensor, value: Tensor, upstream: Tensor, *, scale: float, kind: Kind
) -> list[Tensor]:
    """Return float64 gradients of `dense_attention` in the inputs' own dtype: `CHUNK` query rows at a time, summed."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    total = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in leaves]
    for rows, given in zip(torch.split(leaves[0], CHUNK, -2), torch.split(upstream, CHUNK, -2), strict=True):
        output = dense_attention(rows, leaves[1], leaves[2], scale=scale, kind=kind)
        parts = torch.autograd.grad(output, leaves, given)
        total = [done + part for done, part in zip(total, parts, strict=True)]
    return total


def _error(output: Tensor, exact: Tensor) -> float:
    return (output.double() - exact).abs().max().item()


# What a rounded input may shift: INT8 sums are exact; FP8 tensor cores keep 14 bits of a sum.
ROUNDED_TOLERANCE = {"int8": 1e-6, "float8": 2.0**-10}


def check_linear(output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, rounding: str) -> Check:
    """Compare a linear layer's `output` (rows, out) with float64, on up to `MAX_ROWS` rows of its input (rows, in).

    weight: (out, in), the one that the layer stands for. rounding: what the layer does to each row of its input:
    "float" (nothing), "int8" (to integers, scale max / 127) or "float8" (to E4M3, scale max / 448).
    The allowed error is twice what plain PyTorch loses in the input's dtype, or what the narrow format may lose, plus
    an epsilon band. Any NaN or infinity in the whole output fails.
    """
    rows = sample_rows(len(input), input.device)
    picked, wide = input[rows], weight.double()
    exact = F.linear(rounded_tokens(picked, rounding).double(), wide, None if bias is None else bias.double())
    plain = F.linear(picked, weight.to(input.dtype), bias)
    unrounded = F.linear(picked.double(), weight.to(input.dtype).double(), None if bias is None else bias.double())
    largest = exact.abs().max().item()
    tolerance = 2 * _error(plain, unrounded) / largest + 8 * torch.finfo(input.dtype).eps
    tolerance += ROUNDED_TOLERANCE.get(rounding, 0)
    error = _error(output[rows], exact) / largest if bool(output.isfinite().all()) else float("nan")
    return Check(error, tolerance, f"float64 on {rounding} inputs, {len(rows)} of {len(input)} rows")


def rounded_tokens(x: Tensor, rounding: str) -> Tensor:
    """Return the tokens (T, C) as a layer that rounds them sees them: `rounding` as in `check_linear`."""
    if rounding == "float":
        return x
    largest = 127 if rounding == "int8" else 448
    # By a tensor: by a number, a GPU would multiply by its reciprocal, whose rounding turns ties around.
    scale = x.float().abs().amax(-1, keepdim=True) / torch.full((), float(largest), device=x.device)
    values = x.float() / scale
    rounded = values.round() if rounding == "int8" else values.to(torch.float8_e4m3fn)
    return rounded.double() * scale.double()
