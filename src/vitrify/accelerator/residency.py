"""Which activations stay in the SRAM between the operation that writes them and those that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """An activation tensor's size in bits, and the first and the last step at which it exists."""

    tensor: str
    bits: float
    first: int
    last: int


def demands(lifetimes: Iterable[Lifetime], spare: Mapping[int, float] | None = None) -> dict[str, float]:
    """Return the activation buffer, in bits, from which on each tensor stays in it.

    spare: bits that are free besides at some steps, since no weights are fetched there

    At every step the smaller of the tensors that exist come first; a tensor needs room for itself and for those before
    it, at each step of its life. So the tensors that stay in a given buffer always fit together, and those that stay
    in a smaller buffer stay in a larger one: more SRAM never moves more data.
    """
    by_size = sorted(lifetimes, key=lambda life: (life.bits, life.first, life.tensor))
    if not by_size:
        return {}
    occupied = _Steps(max(life.last for life in by_size) + 1)
    found: dict[str, float] = {}
    for life in by_size:
        occupied.add(life.first, life.last, life.bits)
        found[life.tensor] = occupied.highest(life.first, life.last, spare or {})
    return found


class _Steps:
    """How much each step holds."""

    def __init__(self, steps: int) -> None:
        self._bits: list[float] = [0.0] * steps

    def add(self, first: int, last: int, bits: float) -> None:
        for step in range(first, last + 1):
            self._bits[step] += bits

    def highest(self, first: int, last: int, spare: Mapping[int, float]) -> float:
        return max(self._bits[step] - spare.get(step, 0.0) for step in range(first, last + 1))
