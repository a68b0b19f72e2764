"""Energy by where it is spent."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Split:
    """Energies in pJ: of operations, and of accesses at each level.

    >>> (Split(compute=1) + Split(dram=2) * 3).total_pj
    7.0
    """

    compute: float = 0.0
    register: float = 0.0
    noc: float = 0.0
    sram: float = 0.0
    dram: float = 0.0

    @property
    def total_pj(self) -> float:
        """The sum of all parts."""
        return float(sum(astuple(self)))

    def __add__(self, other: Split) -> Split:
        return Split(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Split:
        return Split(*(part * factor for part in astuple(self)))
