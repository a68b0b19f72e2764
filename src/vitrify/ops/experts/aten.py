"""Grouped experts in plain PyTorch: what the registered ops do without the GPU's kernels. Arguments as in triton.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.ops.shift.registration import shift_linear_op


def order_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the tokens by expert, int32 (T,), and the tokens of each, int32 (2,)."""
    logits = F.linear(x, weight, bias)
    goes = logits[:, 1] > logits[:, 0]
    seconds = goes.sum(dtype=torch.int32)
    return goes.to(torch.uint8).argsort(stable=True).int(), torch.stack((len(x) - seconds, seconds))


def linear(
    x: Tensor,
    order: Tensor,
    counts: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor,
    exponent: Tensor | None,
    shift_bias: Tensor | None,
    bits: int,
    variant: str,
    activations: str,
    gather: bool,
    scatter: bool,
) -> Tensor:
    """Gather, one product per expert, scatter; each expert's results go to their places at once, without a copy."""

    out = x.new_empty(x.shape[0], weight.shape[0])
    sizes = counts.tolist()
    places = torch.split(order.long(), sizes)
    for expert, (tokens, target) in enumerate(zip(torch.split(x, sizes), torch.split(out, sizes), strict=True)):
        rows = x.index_select(0, places[expert]) if gather else tokens
        if expert == 0:
            result = F.linear(rows, weight, bias)
        elif exponent is None:
            result = F.linear(rows, shift, shift_bias)
        else:
            result = shift_linear_op(rows, shift, exponent, shift_bias, bits, variant, activations)
        if scatter:
            out.index_copy_(0, places[expert], result)
        else:
            target.copy_(result)
    return out


def gradient(
    grad: Tensor, x: Tensor, order: Tensor, counts: Tensor, gather: bool, scatter: bool, trained: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the first `trained` weights, (trained, C_out, C), and of both biases, (2, C_out).

    grad (T, C_out): of `linear`'s result, in the tokens' own order if `scatter`, else in the groups'; x: its input, in
    the tokens' own order if `gather`.
    """
    inputs = torch.split(x.index_select(0, order) if gather else x, counts.tolist())
    outputs = torch.split(grad.index_select(0, order) if scatter else grad, counts.tolist())
    weights = [outputs[expert].t() @ inputs[expert] for expert in range(trained)]
    return torch.stack(weights), torch.stack([part.sum(0) for part in outputs])
