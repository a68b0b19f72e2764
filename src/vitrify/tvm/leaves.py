"""A model whose MatAdd and MatShift are single ops in its graph, for a compiler that has kernels of its own for them.

`torch.export` of a converted model holds plain ATen calls: a compiler would fold the decoding of the codes into a float
weight, and compute with codes as with any other numbers. Here the layers that add and shift call these ops instead.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.nn.cores import Dropout
from vitrify.nn.hamming import SHORTEST, Hamming
from vitrify.nn.shift import ShiftLinear
from vitrify.ops.hamming.reference import masked_sum
from vitrify.ops.shift.reference import decoded, lowest_level, power_of_two, quantize_tokens, top_level
from vitrify.ops.shift.registration import shift_linear_op

NAMESPACE = "vitrify_tvm"
OPS = getattr(torch.ops, NAMESPACE)

torch.library.define(f"{NAMESPACE}::mat_add", "(Tensor code, Tensor rows, str codes, bool transposed) -> Tensor")
torch.library.define(f"{NAMESPACE}::mat_shift_integer", "(Tensor rows, Tensor packed, int bits, str variant) -> Tensor")


@torch.library.impl(f"{NAMESPACE}::mat_add", "default")
def _(code: Tensor, rows: Tensor, codes: str, transposed: bool) -> Tensor:
    return masked_sum(code.mT if transposed else code, rows)


@torch.library.register_fake(f"{NAMESPACE}::mat_add")  # type: ignore[untyped-decorator]
def _(code: Tensor, rows: Tensor, codes: str, transposed: bool) -> Tensor:
    return rows.new_empty(*rows.shape[:-2], code.shape[-1 if transposed else -2], rows.shape[-1])


@torch.library.impl(f"{NAMESPACE}::mat_shift_integer", "default")
def _(rows: Tensor, packed: Tensor, bits: int, variant: str) -> Tensor:
    lowest = torch.full((packed.shape[0],), top_level(bits) - lowest_level(variant), dtype=torch.int8)
    weight = decoded(packed, lowest, rows.shape[-1], bits, variant, torch.float64)
    return F.linear(rows.double(), weight).long()


@torch.library.register_fake(f"{NAMESPACE}::mat_shift_integer")  # type: ignore[untyped-decorator]
def _(rows: Tensor, packed: Tensor, bits: int, variant: str) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], packed.shape[0], dtype=torch.int64)


def use_leaves_(model: nn.Module) -> int:
    """Make the packed shift layers and the linear Hamming cores of `model` call the ops; return how many there are.

    Convolutions of patches that do not overlap become matrix products, which is what TVM has fast loops for.
    """
    count = 0
    for module in model.modules():
        if type(module) is ShiftLinear and module.packed:
            _use_leaf_(module)
            count += 1
        elif type(module) is Hamming and module.order == "linear":
            module.__class__ = _LeafHamming
            count += 1
        elif type(module) is nn.Conv2d and _patches(module):
            module.__class__ = _PatchProduct
    return count


def _patches(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return plain and conv.kernel_size == conv.stride and conv.kernel_size != (1, 1)


class _PatchProduct(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        height, width = self.kernel_size
        batch, channels, rows, columns = (
            input.shape[0],
            input.shape[1],
            input.shape[2] // height,
            input.shape[3] // width,
        )
        image = input[:, :, : rows * height, : columns * width]
        patches = image.reshape(batch, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
        out = F.linear(patches.reshape(batch, rows * columns, -1), self.weight.flatten(1), self.bias)
        return out.mT.reshape(batch, -1, rows, columns)


def _use_leaf_(layer: ShiftLinear) -> None:
    layer.__class__ = _LeafShiftLinear
    least = power_of_two(layer.exponent.int() - top_level(layer.bits) + lowest_level(layer.variant))
    layer.register_buffer("least", least, persistent=False)


class _LeafShiftLinear(ShiftLinear):
    least: Tensor  # the lowest power of each output

    def forward(self, input: Tensor) -> Tensor:
        if self.activations != "int8":
            return shift_linear_op(
                input, self.codes, self.exponent, self.bias, self.bits, self.variant, self.activations
            )
        values, scale = quantize_tokens(input, "int8")
        sums = OPS.mat_shift_integer(values, self.codes, self.bits, self.variant)
        out: Tensor = sums.to(scale.dtype) * self.least * scale
        return out if self.bias is None else out + self.bias


class _LeafHamming(Hamming):
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if attn_mask is not None or dropout_p > 0 or is_causal or (bias is not None and self.bias != "drop"):
            options: dict[str, Any] = {"dropout_p": dropout_p, "bias": bias, "is_causal": is_causal}
            return super().forward(query, key, value, attn_mask, scale=scale, dropout=dropout, **options)
        query_code = self.query_binariser(query).to(torch.int8)
        key_code = self._of_keys(key).to(torch.int8)
        codes = self.query_binariser.codes

        def sums(rows: Tensor) -> Tensor:
            context = OPS.mat_add(key_code, rows, codes, True)
            out: Tensor = OPS.mat_add(query_code, context, codes, False)
            return out

        if self.gain is None:
            return F.normalize(value / 2 + sums(value) / math.pi, dim=-1, eps=SHORTEST)
        mean = value.mean(-2, keepdim=True)
        return mean + sums(value - mean) * (self.gain / value.shape[-2])
