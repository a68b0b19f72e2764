"""Closed forms of systolic arrays: SCALE-Sim's points, and an array simulated PE by PE."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_workloads import linear, machine

from vitrify.accelerator.simulate import simulate
from vitrify.accelerator.systolic import best, product
from vitrify.cost.graph import Workload

# (m, k, n): cycles under output-, weight- and input-stationary on 64 x 64, as SCALE-Sim v3 prints them.
SCALE_SIM = {
    (196, 768, 192): (10727, 13895, 18335),
    (1, 192, 1000): (5087, 9167, 3569),
    (197, 192, 576): (11447, 10448, 9191),
    (197, 64, 197): (3039, 1547, 1547),
    (197, 197, 64): (1291, 1547, 4063),
    (197, 192, 192): (3815, 3482, 4583),
    (197, 192, 768): (15263, 13931, 11495),
    (197, 768, 192): (10727, 13931, 18335),
    (64, 197, 64): (322, 1015, 1015),
    (197, 64, 64): (759, 386, 1015),
}
DATAFLOWS = ("output", "weight", "input")
sizes = st.integers(1, 40)


@pytest.mark.parametrize("shape", SCALE_SIM)
def test_every_fold_is_scale_sims_count_which_starts_at_zero(shape):
    found = tuple(product(shape, 64, 64, dataflow).every_fold - 1 for dataflow in DATAFLOWS)
    assert found == SCALE_SIM[shape]


def output_stationary(left, right, rows, columns):
    """Run an array whose PEs keep sums: operands enter skewed, and move right and down each cycle."""
    m, k = left.shape
    n = right.shape[1]
    total = np.zeros((m, n), np.int64)
    cycles = 0
    for top in range(0, m, rows):
        for start in range(0, n, columns):
            a, b, c = (np.zeros((rows, columns), np.int64) for _ in range(3))
            for cycle in range(k + rows + columns - 2):
                a[:, 1:], b[1:] = a[:, :-1].copy(), b[:-1].copy()
                for row in range(rows):
                    at = cycle - row
                    a[row, 0] = left[top + row, at] if 0 <= at < k and top + row < m else 0
                for column in range(columns):
                    at = cycle - column
                    b[0, column] = right[at, start + column] if 0 <= at < k and start + column < n else 0
                c += a * b
                cycles += 1
            total[top : top + rows, start : start + columns] = c[: m - top, : n - start]
    return total, cycles


@settings(max_examples=25, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 6), st.integers(1, 6))
def test_an_array_simulated_pe_by_pe_takes_the_closed_forms_cycles(m, k, n, rows, columns):
    generator = np.random.default_rng(m * k * n)
    left, right = generator.integers(-9, 9, (m, k)), generator.integers(-9, 9, (k, n))
    total, cycles = output_stationary(left, right, rows, columns)
    np.testing.assert_array_equal(total, left @ right)
    assert cycles == product((m, k, n), rows, columns, "output").every_fold


@settings(max_examples=60, deadline=None)
@given(st.tuples(sizes, sizes, sizes), st.integers(1, 20), st.integers(1, 20), st.sampled_from(DATAFLOWS))
def test_no_faster_than_its_pes_and_no_slower_than_draining(shape, rows, columns, dataflow):
    cost = product(shape, rows, columns, dataflow)
    m, k, n = shape
    assert cost.occupied * rows * columns >= m * k * n
    if min(shape) >= rows:  # loading what stays takes as long as there are rows: short streams wait for it
        assert cost.occupied + cost.latency <= cost.every_fold
    assert cost.left >= m * k
    assert cost.right >= k * n


@settings(max_examples=60, deadline=None)
@given(st.tuples(sizes, sizes, sizes), st.sampled_from([8, 16, 32]))
def test_a_larger_array_is_never_slower_as_it_may_use_a_corner(shape, side):
    small, large = (best(shape, s, s, DATAFLOWS, None) for s in (side, 2 * side))
    assert large.occupied + large.latency <= small.occupied + small.latency


def drained(shape, rows, columns, dataflow):
    """Simulate one product whose operands fit into the SRAM, and return the cycles that its array was taken."""
    m, k, n = shape
    hardware = machine(rows, columns, kib=16384, gb_per_s=1e6, dataflows=(dataflow,))
    result = simulate(Workload("one", (m, k), (linear(0, m, k, n),), {}), hardware, drain="every_fold")
    queue = result.queues["array"]
    assert queue.jobs == 1
    return queue.busy - queue.port


@pytest.mark.parametrize("shape", SCALE_SIM)
def test_a_simulated_product_takes_scale_sims_cycles(shape):
    assert tuple(drained(shape, 64, 64, dataflow) - 1 for dataflow in DATAFLOWS) == SCALE_SIM[shape]


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from(DATAFLOWS), st.integers(1, 20), st.integers(1, 20))
def test_a_simulated_product_takes_the_closed_forms_cycles(m, k, n, dataflow, rows, columns):
    assert drained((m, k, n), rows, columns, dataflow) == product((m, k, n), rows, columns, dataflow).every_fold
