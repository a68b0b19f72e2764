"""The linear layers of two experts, multiply and shift, on tokens grouped by expert: for a GPU.

    groups = group_tokens(x, router.weight, router.bias)    # deployed; in training groups_of(index), index by `route`
    hidden = act(grouped_linear(x, groups, *first_layers, gather=True, scatter=False))
    out = grouped_linear(hidden, groups, *second_layers, gather=False, scatter=True)

Router and grouping take two launches and each linear layer one, for both experts; its backward pass takes two, or three
more for small weights. Nothing waits for the GPU. `dispatch` is for any experts and any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vitrify.errors import InputError
from vitrify.ops.experts.registration import mixture_linear_op, mixture_order_op
from vitrify.ops.shift.validation import check_activations, check_exponent, check_format, check_packed


class Groups(NamedTuple):
    """Tokens grouped by expert, in their old order within a group.

    order: int32 (T,), the token at each place. counts: int32 (2,), the tokens of each expert.
    """

    order: Tensor
    counts: Tensor


class Codes(NamedTuple):
    """A packed shift weight: codes uint8 (out, bytes), exponent int8 (out,), and their format.

    activations: what its tokens are rounded to first, as in `ops.shift_linear`.
    """

    codes: Tensor
    exponent: Tensor
    bits: int
    variant: str
    activations: str = "float"


def group_tokens(x: Tensor, weight: Tensor, bias: Tensor | None) -> Groups:
    """Route tokens x (T, C) by a router of two experts, weight (2, C) and bias (2,), and group them.

    A token goes to the second expert if its logit is greater, else to the first. On a GPU the logits are summed in
    another order than the router itself would, and rounded to the dtype of x: close calls may fall otherwise.
    Raises InputError for shapes, dtypes or devices that do not fit.
    """
    _check_linear("the router", x, weight, bias)
    if weight.shape[0] != 2:
        raise InputError(f"the router has {weight.shape[0]} outputs: tokens are grouped for two experts")
    return Groups(*mixture_order_op(x, weight, bias))


def groups_of(index: Tensor) -> Groups:
    """Group tokens by the expert of each, int64 (T,) of 0 and 1 as `route` returns it; nothing waits for the GPU."""
    second = index == 1
    seconds = second.sum(dtype=torch.int32)
    # Bytes: sorting takes one pass for each 8 bits of a key.
    order = second.to(torch.uint8).argsort(stable=True).int()
    return Groups(order, torch.stack((index.shape[0] - seconds, seconds)))


def grouped_linear(
    x: Tensor,
    groups: Groups,
    weight: Tensor,
    bias: Tensor | None,
    shift: Tensor | Codes,
    shift_bias: Tensor | None,
    *,
    gather: bool,
    scatter: bool,
) -> Tensor:
    """Multiply the first expert's tokens by `weight`, the second's by `shift`: x (T, C) -> (T, C_out).

    weight (C_out, C); shift: a weight like it, or its codes; bias (C_out,), for both experts or for none. All floats
    have one dtype. gather: x has the tokens in their own order, else in the groups'. scatter: so has the result.
    Everything but codes gets a gradient; that of activations which codes round is the float ones' (straight-through).
    There are no second derivatives. Raises InputError for shapes, dtypes or devices that do not fit.
    """
    _check_linear("the multiplying expert", x, weight, bias)
    _check_bias("the shift expert", x, weight, shift_bias)
    if (bias is None) != (shift_bias is None):
        raise InputError("one expert has a bias and the other has none: give both or neither")
    if isinstance(shift, Codes):
        values, exponent, bits, variant, activations = shift
        check_format(bits, variant)
        check_activations(activations)
        check_packed(values, x.shape[1], bits)
        check_exponent(exponent, len(values), bits, variant, values=False)
    else:
        values, exponent, bits, variant, activations = shift, None, 4, "ps", "float"  # the format then means nothing
        _check_linear("the shift expert", x, values, None)
    if len(values) != len(weight):
        raise InputError(f"the experts have {len(weight)} and {len(values)} outputs: both need as many")
    if groups.order.shape != x.shape[:1]:
        raise InputError(f"the groups are of {groups.order.shape[0]} tokens, but x is {tuple(x.shape)}")
    for name, tensor in (("codes", values), ("exponent", exponent), ("groups", groups.order)):
        if tensor is not None and tensor.device != x.device:
            raise InputError(f"{name} is on {tensor.device} but x is on {x.device}")
    form = (bits, variant, activations)
    return mixture_linear_op(x, *groups, weight, bias, values, exponent, shift_bias, *form, gather, scatter)


def _check_linear(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise InputError(f"{name} has weight {tuple(weight.shape)}, which does not fit tokens {tuple(x.shape)}")
    _check_like(name, x, weight)
    _check_bias(name, x, weight, bias)


def _check_bias(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise InputError(f"{name} has bias {tuple(bias.shape)} for {len(weight)} outputs")
        _check_like(name, x, bias)


def _check_like(name: str, x: Tensor, tensor: Tensor) -> None:
    if (tensor.dtype, tensor.device) != (x.dtype, x.device):
        raise InputError(f"{name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")
