"""The row-stationary access-count model of Eyeriss, as ShiftAddViT's energy model has it, and its tiling search.

A layer is seven loops: N (images, or rows of a matmul), M (output channels), C (input channels), E x F (output map),
R x S (kernel). A tiling splits four of them over registers (0), PE array (1), SRAM (2) and DRAM (3); how often each
level is accessed is a pure function of it. Formulas and limits: ENERGY.md beside this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Number: TypeAlias = "int | NDArray[np.int64]"
Rule = Literal["least_energy", "balanced"]


@dataclass(frozen=True)
class Layer:
    """The loops of one layer; a matmul of n x c by c x m leaves the rest at 1.

    n rows or images; m, c output and input channels; e, f height and width of the output, h, w of the input; r, s of
    the kernel.
    """

    n: int
    m: int
    c: int
    e: int = 1
    f: int = 1
    r: int = 1
    s: int = 1
    h: int = 1
    w: int = 1
    stride: int = 1

    @property
    def matmul(self) -> bool:
        """Whether input and output are single points, so that no row can be spread over PEs."""
        return self.h == self.w == self.e == self.f == 1

    @property
    def macs(self) -> int:
        """Products of the whole layer."""
        return self.n * self.m * self.c * self.e * self.f * self.r * self.s


@dataclass(frozen=True)
class Machine:
    """The limits on a tiling: words, each of 32 bits or fewer, and PEs. All are strict but the first."""

    psum_words: int = 16
    input_words: int = 12
    weight_words: int = 960
    pes: int = 192
    sram_words: int = 65536
    clock_hz: float = 250e6


class Tiling(NamedTuple):
    """Factors of N, M, C and E by level: scalars, or arrays of as many tilings."""

    n0: Number
    n3: Number
    m0: Number
    m1: Number
    m2: Number
    m3: Number
    c0: Number
    c1: Number
    c2: Number
    e1: Number
    e3: Number


@dataclass(frozen=True)
class Terms:
    """One number for each kind of access: how many words, or (as prices) pJ a word."""

    dram_in: float
    dram_weight: float
    dram_out: float
    sram_in: float
    sram_out: float
    noc_in: float
    noc_weight: float
    noc_psum: float
    register_in: float
    register_weight: float
    register_out: float


TERMS = tuple(field.name for field in fields(Terms))
_WEIGHT_TRAFFIC = [TERMS.index("dram_weight"), TERMS.index("noc_weight")]


@dataclass(frozen=True)
class Best:
    """The tiling that was chosen, its accesses in words, and the cycles it takes."""

    tiling: Tiling
    accesses: Terms
    cycles: int


def access_counts(layer: Layer, tiling: Tiling) -> list[Number]:
    """Return the accesses of each kind, in words and in the order of `TERMS`; arrays for a tiling of arrays."""
    n0, n3, m0, m1, m2, m3, c0, c1, c2, e1, e3 = tiling
    inputs = layer.n * layer.h * layer.w * layer.c
    weights = layer.r * layer.s * layer.c * layer.m
    outputs = layer.n * layer.e * layer.f * layer.m
    # Each input row goes to the R x E / H rows of PEs that need it, and each element to S x F / W products there.
    noc_in = m3 * m2 * m1 * layer.r * layer.e * inputs // layer.h
    return [
        m3 * inputs,
        n3 * e3 * weights,
        outputs,
        m3 * m2 * inputs,
        np.maximum(2 * (c2 - 1), 1) * outputs,
        noc_in,
        n3 * e3 * e1 * weights,
        np.maximum(c2 * (c1 * layer.r - 1), 1) * outputs,
        noc_in * m0 * layer.s * layer.f // layer.w,
        n3 * e3 * e1 * layer.f * n0 * weights,
        np.maximum(2 * c2 * c1 * layer.r * (c0 * layer.s - 1), 1) * outputs,
    ]


def cycles(layer: Layer, tiling: Tiling) -> Number:
    """Return the cycles in which the PEs work through the loops that are not spread over them."""
    t = tiling
    return t.n3 * t.n0 * t.m3 * t.m2 * t.m0 * t.c2 * t.c0 * t.e3 * layer.f * layer.s


@lru_cache(maxsize=4096)
def search(layer: Layer, prices: Terms, product_pj: float, machine: Machine, rule: Rule) -> Best | None:
    """Return the best of all tilings; None where none fits (a wide kernel, or a long output row, overflows the PEs).

    prices       pJ a word for each kind of access; product_pj: of one product
    rule         "least_energy" (ties: fewest cycles), or the authors' "balanced": the least
                 (E - Emin) / Emax + (L - Lmin) / Lmax over energy and latency
    """
    found = _candidates(layer, machine)
    if found is None:
        return None
    price = np.array([getattr(prices, term) for term in TERMS])
    energy = found.counts @ price
    if rule == "balanced":
        energy = energy + product_pj * layer.macs
        # A smaller n0 only moves more weights, so the dearest tiling is among those with n0 = 1.
        dearest = (energy + found.spared @ price[_WEIGHT_TRAFFIC]).max()
        latency = found.cycles
        score = (energy - energy.min()) / dearest + (latency - latency.min()) / latency.max()
        index = int(score.argmin())
    else:
        # The rounding of a dot product must not decide between equals.
        ties = np.flatnonzero(energy <= energy.min() * (1 + 1e-12))
        index = int(ties[found.cycles[ties].argmin()])
    tiling = Tiling(*(int(np.asarray(factor)[index]) for factor in found.tiling))
    return Best(tiling, Terms(*found.counts[index].tolist()), int(found.cycles[index]))


class _Candidates(NamedTuple):
    """Every tiling that fits, each with the greatest n0 that does: no price makes a smaller one better.

    spared    the accesses to weights, DRAM and NoC, that n0 saves against n0 = 1
    """

    tiling: Tiling
    counts: NDArray[np.float64]
    spared: NDArray[np.float64]
    cycles: NDArray[np.int64]


@lru_cache(maxsize=8)
def _candidates(layer: Layer, machine: Machine) -> _Candidates | None:
    m = _splits(layer.m, 4)
    m = m[(m[:, 0] <= machine.psum_words) & (m[:, 1] * layer.r < machine.pes)]
    c = _splits(layer.c, 3)
    c = c[(c[:, 0] * layer.s < machine.input_words) & (c[:, 1] * layer.r < machine.pes)]
    e = _splits(layer.e, 2)
    if not layer.matmul:
        e = e[e[:, 0] > 1]
    fits = (m[:, None, None, 1] * c[None, :, None, 1] * e[None, None, :, 0] * layer.r < machine.pes) & (
        m[:, None, None, 0] * c[None, :, None, 0] * layer.s < machine.weight_words
    )
    mi, ci, ei = np.nonzero(fits)
    (m0, m1, m2, m3), (c0, c1, c2), (e1, e3) = m[mi].T, c[ci].T, e[ei].T
    per_image = (
        c1 * c0 * ((e1 - 1) * layer.stride + layer.r) * ((layer.f - 1) * layer.stride + layer.s)
        + m2 * m1 * m0 * e1 * layer.f
    )
    choices = np.array(divisors(layer.n))
    place = np.searchsorted(choices, (machine.sram_words - 1) // per_image, side="right") - 1
    kept = np.flatnonzero(place >= 0)
    if not kept.size:
        return None
    n0 = choices[place[kept]]
    rest = (factor[kept] for factor in (m0, m1, m2, m3, c0, c1, c2, e1, e3))
    tiling = Tiling(n0, layer.n // n0, *rest)
    counts = np.empty((kept.size, len(TERMS)))
    for column, count in enumerate(access_counts(layer, tiling)):
        counts[:, column] = count
    spared = counts[:, _WEIGHT_TRAFFIC] * (n0 - 1)[:, None]
    return _Candidates(tiling, counts, spared, np.asarray(cycles(layer, tiling)))


@lru_cache(maxsize=64)
def _splits(number: int, parts: int) -> NDArray[np.int64]:
    """Return every way to write a number as an ordered product of `parts` factors, one a row."""
    rows = [[number]]
    for _ in range(parts - 1):
        rows = [[*head, d, rest // d] for *head, rest in rows for d in divisors(rest)]
    return np.array(rows, dtype=np.int64)


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a number, in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))
