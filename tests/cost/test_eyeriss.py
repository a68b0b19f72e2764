"""The access counts and the tiling search, against a naive search written from docs: every factorisation in a loop."""

from dataclasses import astuple, replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrify.cost.eyeriss import TERMS, Layer, Machine, Terms, search

# The price of a word at each level, all different.
PRICES = Terms(400.0, 410.0, 390.0, 44.0, 45.0, 14.0, 15.0, 7.0, 7.5, 14.5, 6.5)
PRODUCT_PJ = 3.7


def factors(number, parts):
    for choice in product([d for d in range(1, number + 1) if number % d == 0], repeat=parts - 1):
        rest = number
        for d in choice:
            rest, left = divmod(rest, d)
            if left:
                break
        else:
            yield (*choice, rest)


def naive(layer, machine):
    """Return (energy without products, latency, tiling) of every tiling that fits."""
    n, m, c, e, f, r, s, h, w, stride = astuple(layer)
    inputs, weights, outputs = n * h * w * c, r * s * c * m, n * e * f * m
    found = []
    for (n0, n3), (m0, m1, m2, m3), (c0, c1, c2), (e1, e3) in product(
        factors(n, 2), list(factors(m, 4)), list(factors(c, 3)), list(factors(e, 2))
    ):
        if not layer.matmul and e1 == 1:
            continue
        patch = ((e1 - 1) * stride + r) * ((f - 1) * stride + s)
        if (
            m0 > machine.psum_words
            or m1 * c1 * e1 * r >= machine.pes
            or c0 * s >= machine.input_words
            or m0 * c0 * s >= machine.weight_words
            or n0 * c1 * c0 * patch + n0 * m2 * m1 * m0 * e1 * f >= machine.sram_words
        ):
            continue
        counts = (
            m3 * inputs,
            n3 * e3 * weights,
            outputs,
            m3 * m2 * inputs,
            max(2 * (c2 - 1), 1) * outputs,
            m3 * m2 * m1 * r * e * inputs // h,
            n3 * e3 * e1 * weights,
            max(c2 * (c1 * r - 1), 1) * outputs,
            m3 * m2 * m1 * m0 * r * e * s * f * inputs // (h * w),
            n3 * e3 * e1 * f * n0 * weights,
            max(c2 * c1 * r * (c0 * s - 1) * 2, 1) * outputs,
        )
        energy = sum(count * price for count, price in zip(counts, astuple(PRICES), strict=True))
        found.append((energy, n3 * n0 * m3 * m2 * m0 * c2 * c0 * e3 * f * s, counts))
    return found


LAYERS = {
    "matmul": Layer(12, 24, 12),
    "prime": Layer(7, 13, 11),
    "one row": Layer(1, 32, 6),
    "conv": Layer(2, 8, 6, 6, 5, 3, 3, 6, 5),
    "strided": Layer(1, 6, 4, 4, 4, 3, 3, 8, 8, 2),
    "depth-wise": Layer(6, 1, 1, 8, 8, 3, 3, 8, 8),
}
# So small that every limit cuts some tilings off.
TIGHT = Machine(psum_words=4, input_words=7, weight_words=16, pes=24, sram_words=400)


@pytest.mark.parametrize("machine", [Machine(), TIGHT], ids=["eyeriss", "tight"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_search_finds_what_the_naive_one_finds(layer, machine):
    tilings = naive(layer, machine)
    assert tilings
    best = search(layer, PRICES, PRODUCT_PJ, machine, "least_energy")
    least = min(tilings)[0]
    assert spent(best) == pytest.approx(least, rel=1e-9)
    assert best.cycles == min(cycles for energy, cycles, _ in tilings if energy <= least * (1 + 1e-12))

    product_pj = PRODUCT_PJ * layer.macs
    energies, latencies = [t[0] + product_pj for t in tilings], [t[1] for t in tilings]
    (least, dearest), (fastest, slowest) = ((min(x), max(x)) for x in (energies, latencies))

    def score(energy, cycles):
        return (energy - least) / dearest + (cycles - fastest) / slowest

    best = search(layer, PRICES, PRODUCT_PJ, machine, "balanced")
    assert score(spent(best) + product_pj, best.cycles) == pytest.approx(
        min(map(score, energies, latencies)), abs=1e-12
    )
    assert astuple(best.accesses) in {counts for _, _, counts in tilings}


def spent(best):
    return sum(getattr(best.accesses, term) * getattr(PRICES, term) for term in TERMS)


def test_each_limit_is_met_and_strict():
    """One word or PE fewer than a tiling needs takes it away; the register file of sums may be full."""
    layer = Layer(1, 4, 4)
    assert search(layer, PRICES, 0.0, Machine(psum_words=4, input_words=2, pes=2), "least_energy").tiling.m0 == 4
    tiling = search(layer, PRICES, 0.0, Machine(pes=5, input_words=2), "least_energy").tiling
    assert tiling.m1 * tiling.c1 == 4
    tiling = search(layer, PRICES, 0.0, Machine(pes=4, input_words=2), "least_energy").tiling
    assert tiling.m1 * tiling.c1 < 4
    assert search(layer, PRICES, 0.0, Machine(sram_words=3), "least_energy").tiling[:6] == (1, 1, 1, 1, 1, 4)
    assert search(layer, PRICES, 0.0, Machine(sram_words=2), "least_energy") is None


def test_a_kernel_wider_than_the_input_registers_fits_no_tiling():
    patch = Layer(1, 192, 3, 14, 14, 16, 16, 224, 224, 16)
    assert search(patch, PRICES, 0.0, Machine(), "least_energy") is None
    assert search(replace(patch, s=11), PRICES, 0.0, Machine(), "least_energy") is not None


def test_a_convolution_spreads_its_output_rows_over_pes_or_fits_no_tiling():
    """13 rows spread all or not at all, over 3 PEs each."""
    rows = Layer(1, 4, 4, 13, 13, 3, 3, 13, 13)
    assert search(rows, PRICES, 0.0, Machine(pes=39), "least_energy") is None
    assert search(rows, PRICES, 0.0, Machine(pes=40), "least_energy").tiling.e1 == 13


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 400))
def test_the_factors_make_up_the_loops_and_every_product_reads_its_weight(n, m, c):
    best = search(Layer(n, m, c), PRICES, 0.0, Machine(), "least_energy")
    t = best.tiling
    assert (t.n0 * t.n3, t.m0 * t.m1 * t.m2 * t.m3, t.c0 * t.c1 * t.c2) == (n, m, c)
    assert best.accesses.register_weight == best.accesses.register_in == n * m * c
