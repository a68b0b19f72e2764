"""SRAM prices: the table's points as they are, the laws between and beyond them against CACTI's runs they never saw."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrify.accelerator.sram import sram
from vitrify.errors import InputError


@pytest.mark.parametrize(
    ("capacity_kib", "width_bits", "read_pj", "write_pj", "area_mm2"),
    [
        (200, 512, 41.5, 52.7, 0.653),
        (200, 64, 10.4, 7.8, 0.542),
        (64, 64, 6.1, 4.4, 0.190),
        (32, 64, 3.7, 3.1, 0.102),
    ],
)
def test_the_points_of_the_table(capacity_kib, width_bits, read_pj, write_pj, area_mm2):
    memory = sram(capacity_kib, width_bits)
    assert memory.read_pj_per_bit * width_bits == pytest.approx(read_pj, rel=0.02)
    assert memory.write_pj_per_bit * width_bits == pytest.approx(write_pj, rel=0.02)
    assert memory.area_mm2 == pytest.approx(area_mm2, rel=0.01)
    assert memory.how.startswith("measured: 28 nm, low-operating-power cells")
    assert "360 K, no ECC, one read and one write port" in memory.how


def test_leakage_is_that_of_the_whole_memory():
    assert sram(200, 512).leakage_mw == pytest.approx(63, rel=0.01)
    assert sram(200, 64).leakage_mw == pytest.approx(sram(200, 512).leakage_mw, rel=0.01)


@pytest.mark.parametrize(
    ("capacity_kib", "width_bits", "read_pj", "write_pj", "area_mm2", "leakage_mw"),
    [  # CACTI's figures, with the table's settings, at points that the table leaves out
        (24, 64, 3.489, 2.61, 0.06701, 8.224),
        (48, 192, 9.539, 9.255, 0.1535, 15.67),
        (100, 128, 10.94, 9.114, 0.3044, 31.78),
        (100, 512, 29.06, 34.59, 0.3981, 31.95),
        (256, 256, 30.55, 29.91, 0.773, 80.93),
        (1024, 128, 38.47, 31.86, 2.81, 311.6),
        (1024, 512, 119.9, 118.7, 3.625, 313),
    ],
)
def test_between_the_points_the_law_is_near_what_cacti_says(
    capacity_kib, width_bits, read_pj, write_pj, area_mm2, leakage_mw
):
    memory = sram(capacity_kib, width_bits)
    assert memory.how == "derived: a power law in capacity and width through the measured points around it"
    assert memory.read_pj_per_bit * width_bits == pytest.approx(read_pj, rel=0.1)
    assert memory.write_pj_per_bit * width_bits == pytest.approx(write_pj, rel=0.1)
    assert memory.area_mm2 == pytest.approx(area_mm2, rel=0.2)
    assert memory.leakage_mw == pytest.approx(leakage_mw, rel=0.05)


@pytest.mark.parametrize("capacity_kib", [1, 8192])
def test_beyond_the_points_it_says_so(capacity_kib):
    assert sram(capacity_kib, 64).how.startswith("derived: beyond the measured 4 to 2048 KiB, the nearest points' law")


def test_a_port_narrower_than_any_point_pays_for_a_whole_word():
    part, word = sram(64, 8), sram(64, 32)
    assert part.how.endswith("; 8 bits of a word of 32")
    assert part.read_pj_per_bit == 4 * word.read_pj_per_bit
    assert (part.area_mm2, part.leakage_mw) == (word.area_mm2, word.leakage_mw)


def test_a_port_wider_than_any_point_is_made_of_banks():
    wide, bank = sram(256, 4096), sram(64, 1024)
    assert wide.how.endswith("; 4 banks side by side")
    assert wide.read_pj_per_bit == bank.read_pj_per_bit
    assert wide.write_pj_per_bit == bank.write_pj_per_bit
    assert (wide.area_mm2, wide.leakage_mw) == pytest.approx((4 * bank.area_mm2, 4 * bank.leakage_mw))


@given(
    capacity=st.floats(min_value=0.25, max_value=16384),
    width=st.integers(min_value=1, max_value=8192),
    factor=st.floats(min_value=1.01, max_value=8),
)
@settings(max_examples=200, deadline=None)
def test_a_larger_memory_is_never_cheaper(capacity, width, factor):
    small, large = sram(capacity, width), sram(capacity * factor, width)
    for quantity in ("read_pj_per_bit", "write_pj_per_bit", "area_mm2", "leakage_mw"):
        assert 0 < getattr(small, quantity) <= getattr(large, quantity) * (1 + 1e-9)


@pytest.mark.parametrize("width", [8, 64, 100, 1024])
def test_no_jump_at_a_point(width):
    for capacity in (4, 16, 200, 2048):
        below, above = (sram(capacity * f, width) for f in (1 - 1e-9, 1 + 1e-9))
        assert math.isclose(below.read_pj_per_bit, above.read_pj_per_bit, rel_tol=1e-6)
        assert math.isclose(below.area_mm2, above.area_mm2, rel_tol=1e-6)


@pytest.mark.parametrize(("capacity_kib", "width_bits", "name"), [(0, 64, "capacity_kib"), (64, -1, "width_bits")])
def test_sizes_that_are_none(capacity_kib, width_bits, name):
    with pytest.raises(InputError, match=f"an SRAM's {name} must be positive, not "):
        sram(capacity_kib, width_bits)
