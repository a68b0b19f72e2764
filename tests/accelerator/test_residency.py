"""What stays in the SRAM always fits, and more of it stays in a larger one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vitrify.accelerator.residency import Lifetime, demands

lives = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 12), st.integers(0, 6)), max_size=14).map(
    lambda rows: [Lifetime(f"t{i}", bits, first, first + length) for i, (bits, first, length) in enumerate(rows)]
)


@given(lives, st.integers(0, 120), st.integers(0, 120))
def test_what_stays_fits_at_every_step_and_grows_with_the_buffer(lifetimes, room, more):
    needed = demands(lifetimes)
    assert set(needed) == {life.tensor for life in lifetimes}
    staying = {name for name, bits in needed.items() if bits <= room}
    for step in range(20):
        assert sum(x.bits for x in lifetimes if x.tensor in staying and x.first <= step <= x.last) <= room
    assert staying <= {name for name, bits in needed.items() if bits <= room + more}


def test_a_tensor_alone_needs_its_own_size_and_the_larger_of_two_needs_both():
    small, large = Lifetime("small", 8, 0, 2), Lifetime("large", 16, 2, 3)
    assert demands([large]) == {"large": 16}
    assert demands([large, small]) == {"small": 8, "large": 24}
    assert demands([large, Lifetime("gone", 8, 0, 1)])["large"] == 16
