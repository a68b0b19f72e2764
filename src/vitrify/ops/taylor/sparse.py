"""ViTALiTy's sparse training part, and Sanger's sparse softmax; docs/papers.md 3. Quadratic in the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.ops.taylor import aten
from vitrify.ops.taylor.reference import select


def logits(query: Tensor, key: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor, float | Tensor]:
    """Return scale q.k^ (B, H, Nq, Nk), the centred keys and n. Softmax does not see the centring: it shifts rows."""
    key, _, n = select(keep, key, key)
    centred, _, _ = select(keep, key - key.sum(-2, keepdim=True) / n, key)
    return (query * scale) @ centred.mT, centred, n


@torch.no_grad()
def predict(
    query: Tensor, centred_key: Tensor, keep: Tensor | None, scale: float, threshold: float | Tensor, bits: int
) -> Tensor:
    """Return the bool mask (B, H, Nq, Nk) of entries whose predicted probability is at least `threshold`."""
    mask = probabilities(query, centred_key, keep, scale, bits) >= threshold
    return mask if keep is None else mask & keep[:, None, None, :]


@torch.no_grad()
def probabilities(query: Tensor, centred_key: Tensor, keep: Tensor | None, scale: float, bits: int) -> Tensor:
    """Return the predicted softmax (B, H, Nq, Nk); padded keys have 0.

    Queries and centred keys are rounded to `bits` bits, symmetrically, with one step per image and head. Queries are
    all counted in their step: a key-padding mask says nothing about them.
    """
    query, query_step = quantise(query, bits)
    key, key_step = quantise(centred_key, bits)
    scores = (query * (query_step * key_step * scale)) @ key.mT
    return hide(scores, keep).softmax(-1)


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return floats with integer values up to 2^(bits-1) - 1 and the step (B, H, 1, 1): x ~ integer * step."""
    top = 2 ** (bits - 1) - 1
    step = x.abs().amax((-2, -1), keepdim=True) / top
    # An all-zero head has step 0; its integers are 0 for any divisor.
    return (x / step.where(step > 0, 1)).round_(), step


def hide(scores: Tensor, keep: Tensor | None) -> Tensor:
    """Set the scores of padded keys to the lowest finite number: probability 0, and no NaN where all are padded."""
    return scores if keep is None else scores.masked_fill(~keep[:, None, None, :], torch.finfo(scores.dtype).min)


def density(mask: Tensor, keep: Tensor | None) -> Tensor:
    """Return the kept share of the valid entries, a 0-dim float32 tensor (0 if no entry is valid)."""
    kept = mask.count_nonzero()
    if keep is None:
        return kept / mask.numel()
    return kept / (keep.sum() * (mask.shape[1] * mask.shape[2])).clamp(min=1)


def residual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    threshold: float | Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Return (mask * (softmax - taylor_weights)) V, in float32 or wider, and the mask's density."""
    query, key, value = _wide(query, key, value)
    x, centred, n = logits(query, key, keep, scale)
    mask = predict(query, centred, keep, scale, threshold, bits)
    # Centred keys sum to 0 up to rounding only, while the low-rank part's weights sum to 1 exactly: what is missing
    # would meet the common offset of V. In exact numbers this mean of x is 0, and so is its gradient.
    level = 1 - x.detach().sum(-1, keepdim=True) / n
    # Few passes over the n x n entries, forward and backward: in place, and no product with the mask (a conversion).
    if isinstance(n, Tensor):
        difference = hide(x, keep).softmax(-1).sub((x + level) / n)
    else:
        difference = torch.add(x.softmax(-1), x, alpha=-1 / n).sub_(level / n)
    _, value, _ = select(keep, value, value)
    return difference.masked_fill_(~mask, 0) @ value, density(mask, keep)


def sparse_softmax(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    scale: float,
    threshold: float | Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Return softmax over the kept entries alone, times V, in float32 or wider, and the mask's density."""
    query, key, value = _wide(query, key, value)
    x, centred, _ = logits(query, key, keep, scale)
    mask = predict(query, centred, keep, scale, threshold, bits)
    # The lowest finite number gives dropped entries probability 0, and keeps a row without any other finite.
    probabilities = x.masked_fill(~mask, torch.finfo(x.dtype).min).softmax(-1)
    _, value, _ = select(keep, value, value)
    return (probabilities @ value).masked_fill(~mask.any(-1, keepdim=True), 0), density(mask, keep)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(aten.accumulate_dtype(t.dtype)) for t in tensors)
