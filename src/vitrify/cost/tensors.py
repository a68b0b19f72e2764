"""Which tensor is which: every storage has a name, and so has each part of it that a view selects."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from vitrify.cost.graph import Operand, OperandKind

Region = tuple[int, tuple[tuple[int, int], ...]]


@dataclass
class Entry:
    """What a storage holds: the fields of an Operand, and the region of memory that is the whole tensor.

    constant  made from nothing that the model computes or learns (arange, zeros): it could be made once
    holder    a tensor of that storage, kept so that no other gets its address
    """

    name: str
    kind: OperandKind
    producer: str | None
    bits: int
    region: Region
    shape: tuple[int, ...]
    holder: Tensor
    constant: bool = False
    parts: dict[Region, int] = field(default_factory=dict)


class Tensors:
    """Names of tensors by their storage: parameters by their own, results by their operation's."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._constants = 0

    def add_weights(self, model: nn.Module) -> None:
        """Name the parameters and buffers; of two names for one tensor the first stays."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key(tensor) not in self._entries:
                self.bind(tensor, Operand(name, tuple(tensor.shape), bits_of(tensor), "weight"))

    def bind(self, tensor: Tensor, operand: Operand, *, constant: bool = False) -> None:
        """Say that the storage of `tensor` now holds `operand`."""
        self._entries[key(tensor)] = Entry(
            name=operand.tensor,
            kind=operand.kind,
            producer=operand.producer,
            bits=operand.bits,
            region=region(tensor),
            shape=tuple(tensor.shape),
            holder=tensor,
            constant=constant,
        )

    def bind_constant(self, tensor: Tensor) -> None:
        """Say that the storage holds a constant, which counts as a weight."""
        name = f"constant{self._constants}"
        self._constants += 1
        self.bind(tensor, Operand(name, tuple(tensor.shape), bits_of(tensor), "weight"), constant=True)

    def rebind(self, tensor: Tensor, operand: Operand) -> None:
        """Say that `tensor`, a view of any part of its storage, was written in place: all of it is `operand` now."""
        entry = self._entries[key(tensor)]
        entry.name, entry.kind, entry.producer = operand.tensor, operand.kind, operand.producer
        entry.constant, entry.parts = False, {}

    def whole(self, tensor: Tensor) -> Operand:
        """Return the operand of which `tensor` is a part, or which it is."""
        entry = self._entry(tensor)
        return Operand(entry.name, entry.shape, entry.bits, entry.kind, entry.producer)

    def operand(self, tensor: Tensor) -> Operand:
        """Return the tensor as an operand, in its own shape; a selection is named after the whole, "op3.out[1]"."""
        entry = self._entry(tensor)
        mine = region(tensor)
        name = entry.name
        if mine != entry.region:
            name = f"{name}[{entry.parts.setdefault(mine, len(entry.parts))}]"
        return Operand(name, tuple(tensor.shape), entry.bits, entry.kind, entry.producer)

    def is_whole(self, tensor: Tensor) -> bool:
        """Say whether `tensor` covers all that its storage was bound to."""
        return region(tensor) == self._entry(tensor).region

    def is_constant(self, tensor: Tensor) -> bool:
        """Say whether nothing that the model computes or learns went into it."""
        return self._entry(tensor).constant

    def _entry(self, tensor: Tensor) -> Entry:
        if key(tensor) not in self._entries:
            # A tensor made before the trace, or out of its sight.
            self.bind_constant(tensor)
        return self._entries[key(tensor)]


def key(tensor: Tensor) -> int:
    """Return what views of one storage share."""
    return int(tensor.untyped_storage()._cdata)


def bits_of(tensor: Tensor) -> int:
    """Return the width of one element in bits."""
    return tensor.dtype.itemsize * 8


def accumulator_bits(bits: int) -> int:
    """Return the width of sums of products of floats: 64 for float64, 32 for all others."""
    return max(32, bits)


def region(tensor: Tensor) -> Region:
    """Return the elements of its storage that a tensor covers, whatever the order and number of its dimensions."""
    axes = sorted(
        ((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and stride),
        reverse=True,
    )
    merged: list[tuple[int, int]] = []
    for stride, size in axes:
        if merged and merged[-1][0] == stride * size:
            merged[-1] = (stride, merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return int(tensor.storage_offset()), tuple(merged)


def numel(shape: torch.Size | tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return prod(shape)
