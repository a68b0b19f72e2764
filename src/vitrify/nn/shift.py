"""Shift layers: linear layers and convolutions whose weights are a sign and a power of two (docs/papers.md 7).

>>> import torch
>>> from vitrify.nn import ShiftLinear
>>> linear = torch.nn.Linear(64, 10)
>>> shift, error = ShiftLinear.from_linear(linear, bits=4)  # a copy, and the relative error of its weight
>>> _ = shift.pack_()  # from here on codes instead of a weight
>>> sorted(shift.state_dict())
['bias', 'codes', 'exponent']
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import UnsupportedError
from vitrify.ops.shift import (
    cache,
    cpu,
    pack_codes,
    quantize_tokens_ste,
    shift_decode,
    shift_linear,
    shift_quantize,
    shift_ste,
    unpack_codes,
)
from vitrify.ops.shift.reference import decoded
from vitrify.ops.shift.validation import (
    check_activations,
    check_format,
    check_representable,
    check_weight,
    has_values,
)
from vitrify.ops.tracing import exporting, fx_leaf


class _ShiftWeight(nn.Module):
    """What shift layers share: one latent weight, rounded at each forward, until `pack_()` replaces it by codes."""

    weight: Tensor
    codes: Tensor
    exponent: Tensor
    bits: int = 4
    variant: str = "ps"
    _source: type[nn.Module]

    @classmethod
    def adopt_(cls, module: nn.Module, bits: int = 4, variant: str = "ps") -> Self:
        """Turn `module` itself into a shift layer and return it: same parameters, state-dict keys and hooks.

        The weight, in float, stays as the latent weight: what is trained, and rounded at each forward.
        Raises UnsupportedError unless `module` is exactly the plain torch layer with a weight Parameter of its own,
        InputError for bits, variant, or a weight that is not finite.
        """
        check_format(bits, variant)
        source = cls._source
        if type(module) is not source:
            raise UnsupportedError(f"{cls.__name__} is made from nn.{source.__name__}, not from {_name(module)}")
        weight = module._parameters.get("weight")
        if weight is None:
            raise UnsupportedError(f"this {_name(module)} computes its weight (weight norm?): remove that first")
        check_weight(weight)
        # Not a new module: whoever holds this one, or its parameters, holds the shift layer.
        module.__class__ = cls
        assert isinstance(module, cls)
        module.bits, module.variant = bits, variant
        return module

    @property
    def packed(self) -> bool:
        """Whether codes have replaced the latent weight."""
        return "codes" in self._buffers

    def pack_(self) -> Self:
        """Replace the latent weight by buffers `codes` (uint8) and `exponent` (int8), for good; eval outputs are equal.

        Equal bit for bit with float activations; with quantised ones, up to the rounding of a product in floats.
        3 and 4 bits take half a byte per weight, 5 and 6 bits one. Only the bias can be trained from here on. Also
        turns a fresh layer into one that loads a packed state dict. A packed layer is left as it is.
        Raises InputError if the weight is not finite or its dtype cannot hold a power of two that is used.
        """
        if self.packed:
            return self
        codes, exponent = shift_quantize(self.weight, self.bits, self.variant)
        check_representable(codes, exponent, self.bits, self.variant, self.weight.dtype)
        self.register_parameter("weight", None)
        self.register_buffer("codes", pack_codes(codes, self.bits))
        self.register_buffer("exponent", exponent)
        return self

    def restore_(self) -> nn.Module:
        """Turn the layer back into the plain one it was made from, which multiplies by the latent weight; return it.

        Raises UnsupportedError once packed: the latent weight is gone.
        """
        if self.packed:
            raise UnsupportedError("a packed layer has no latent weight to go back to: restore it before pack_()")
        self.__class__ = self._source  # type: ignore[assignment]
        del self.bits, self.variant
        return self

    def decoded_weight(self) -> Tensor:
        """Return the weight that is computed with, in the layer's shape: latent dtype, float32 once packed, no grad."""
        if not self.packed:
            return shift_ste(self.weight.detach(), self.bits, self.variant)
        return shift_decode(self._unpacked(), self.exponent, self.bits, self.variant)

    def quantization_error(self) -> float:
        """Return |decoded - latent| / |latent| (Frobenius norms); NaN on meta, where there are no values.

        Raises UnsupportedError once packed: the latent weight is gone.
        """
        if self.packed:
            raise UnsupportedError("a packed layer has no latent weight to compare with: ask before pack_()")
        if not has_values(self.weight):
            return float("nan")
        weight = self.weight.detach().double()
        norm = weight.norm().item()
        return (self.decoded_weight().double() - weight).norm().item() / norm if norm else 0.0

    def extra_repr(self) -> str:
        """Add the format to the layer's own line."""
        return f"{super().extra_repr()}, bits={self.bits}, variant={self.variant!r}, packed={self.packed}"

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _unpacked(self) -> Tensor:
        shape = self._weight_shape()
        width = torch.Size(shape[1:]).numel()
        return unpack_codes(self.codes, width, self.bits).reshape(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Refuse a cast to float16 that codes would not survive: they are integers, which the cast itself passes by.

        Weights decoded for the old dtype are given up.
        """
        if self.packed and fn(torch.zeros((), device=self.codes.device)).dtype == torch.float16:
            check_representable(self._unpacked(), self.exponent, self.bits, self.variant, torch.float16)
        if self.packed:
            cache.forget(self.codes)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class ShiftLinear(_ShiftWeight, nn.Linear):
    """nn.Linear with weights s 2^P: `adopt_` an existing layer in place, or copy one with `from_linear`.

    bits         3 to 6: a sign and bits - 1 bits of exponent
    variant      "ps" has a 0 among its levels, "q" has one more power of two instead
    activations  "float", or what each token is rounded to before it is multiplied: "int8", so that the layer adds
                 shifted integers, or "float8" (E4M3), each with a scale per token
    Each output channel has its own power-of-two scale. Training rounds one latent weight, and the activations, at each
    forward and hands their gradients straight through. `pack_()` for deployment.
    """

    activations: str = "float"
    _source = nn.Linear

    @classmethod
    def adopt_(cls, module: nn.Module, bits: int = 4, variant: str = "ps", activations: str = "float") -> Self:
        """Turn `module` itself into a shift layer and return it, with the same promises and errors as ShiftConv2d."""
        check_activations(activations)
        shift = super().adopt_(module, bits, variant)
        shift.activations = activations
        return shift

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, bits: int = 4, variant: str = "ps", activations: str = "float"
    ) -> tuple[Self, float]:
        """Return (a shift layer made from a copy of `linear`, the relative error of its weight). Errors as `adopt_`."""
        if type(linear) is not nn.Linear:
            raise UnsupportedError(f"{cls.__name__} is made from nn.Linear, not from {_name(linear)}")
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        # skip_init draws no random numbers, which would shift the caller's.
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        copy: nn.Linear = nn.utils.skip_init(nn.Linear, *sizes, **like)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for mine, theirs in zip(copy.parameters(), linear.parameters(), strict=True):
                mine.copy_(theirs).requires_grad_(theirs.requires_grad)
        shift = cls.adopt_(copy.train(linear.training), bits, variant, activations)
        return shift, shift.quantization_error()

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), as nn.Linear, in any float dtype and under autocast."""
        if self.packed:
            return shift_linear(
                input,
                self.codes,
                self.exponent,
                self.bias,
                bits=self.bits,
                variant=self.variant,
                activations=self.activations,
            )
        input = quantize_tokens_ste(input, self.activations)
        return F.linear(input, shift_ste(self.weight, self.bits, self.variant), self.bias)

    def restore_(self) -> nn.Module:
        """Turn the layer back into the nn.Linear it was made from; UnsupportedError once packed."""
        plain = super().restore_()
        plain.__dict__.pop("activations", None)
        return plain

    def extra_repr(self) -> str:
        """Add the activations' format, where they have one, to the layer's own line."""
        rounded = "" if self.activations == "float" else f", activations={self.activations!r}"
        return f"{super().extra_repr()}{rounded}"

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features


class ShiftConv2d(_ShiftWeight, nn.Conv2d):
    """nn.Conv2d with weights s 2^P, for patch embeddings and spatial reductions; arguments as ShiftLinear's.

    Packed, it saves memory and no time. On a CPU, without torch.compile, the weight is decoded once, elsewhere always.
    """

    _source = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C_out, H_out, W_out), as nn.Conv2d, in any float dtype and under autocast."""
        weight = self._decoded(input) if self.packed else shift_ste(self.weight, self.bits, self.variant)
        out: Tensor = self._conv_forward(input, weight, self.bias)
        return out

    def _decoded(self, input: Tensor) -> Tensor:
        return _decoded_like(
            input, self.codes, self.exponent, self._weight_shape(), bits=self.bits, variant=self.variant
        )

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size


@fx_leaf
def _decoded_like(
    input: Tensor, codes: Tensor, exponent: Tensor, shape: tuple[int, ...], *, bits: int, variant: str
) -> Tensor:
    kept = codes.device.type == "cpu" and has_values(codes) and not (exporting() or torch.compiler.is_compiling())
    decode = cpu.weight if kept else decoded
    return decode(codes, exponent, torch.Size(shape[1:]).numel(), bits, variant, input.dtype).reshape(shape)


def _name(module: nn.Module) -> str:
    return type(module).__name__
