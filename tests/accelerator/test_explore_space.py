"""Spaces: what lists, ranges and joint places mean, and what is refused by name."""

from __future__ import annotations

import pytest
from small_workloads import machine

from vitrify.accelerator.explore.space import differences, read
from vitrify.accelerator.hardware import load
from vitrify.errors import InputError

VITALITY = load("vitality")


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ([64, 200], (64, 200)),
        ({"low": 100, "high": 400, "factor": 2}, (100, 200, 400)),
        ({"low": 100, "high": 399, "factor": 2}, (100, 200)),
        ({"low": 64, "high": 256, "step": 64}, (64, 128, 192, 256)),
        ({"low": 0.1, "high": 0.3, "step": 0.1}, (0.1, 0.2, 0.3)),
        ({"low": 19.2, "high": 76.8, "factor": 2}, (19.2, 38.4, 76.8)),
        ({"low": 1, "high": 1000, "factor": 10}, (1, 10, 100, 1000)),
        ({"low": 8, "high": 8, "step": 1}, (8,)),
        ({"low": 1.5, "high": 3.5, "step": 0.5}, (1.5, 2, 2.5, 3, 3.5)),
    ],
)
def test_lists_and_ranges(entry, values):
    found = read({"dram.gb_per_s": entry}, VITALITY).axes["dram.gb_per_s"]
    assert found == values
    assert [type(a) for a in found] == [type(b) for b in values]


def test_points_are_all_designs_once_with_the_last_axis_fastest():
    space = read({"sram_kib": [64, 128], "schedule": ["systolic"], "engines.array.rows": [4, 8, 16]}, machine())
    points = [space.point(index) for index in range(space.size)]
    assert points == [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 1), (1, 0, 2)]
    assert space.design(points[4]) == {"sram_kib": 128, "schedule": "systolic", "engines.array.rows": 8}


def test_places_with_commas_between_move_together():
    space = read({"engines.general.rows, engines.diagonal.rows": [32], "sram_kib": [100]}, VITALITY)
    assert space.changes((0, 0)) == {"engines.general.rows": 32, "engines.diagonal.rows": 32, "sram_kib": 100}
    changed = VITALITY.with_(space.changes((0, 0)))
    assert (changed.arrays["general"].rows, changed.arrays["diagonal"].rows, changed.sram_kib) == (32, 32, 100)


def test_the_start_has_a_design_too():
    space = read(
        {"engines.general.rows, engines.general.columns": [32], "engines.general.dataflows": [["output"]]}, VITALITY
    )
    assert space.design_of(VITALITY) == {
        "engines.general.rows, engines.general.columns": 64,
        "engines.general.dataflows": ["weight"],
    }
    uneven = read({"engines.general.columns, engines.diagonal.columns": [32]}, VITALITY)
    assert uneven.design_of(VITALITY) == {"engines.general.columns, engines.diagonal.columns": "64 / 1"}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "must map places of the hardware"),
        ({"engines.general.row": [1]}, "did you mean 'engines.general.rows'"),
        ({"engines.diagonal.lanes": [1]}, "unknown place"),
        ({"sram_kib": []}, "sram_kib is empty"),
        ({"sram_kib": 64}, "must be a list of values, or a range with low, high and step"),
        ({"sram_kib": [64, 64]}, "sram_kib has 64 twice"),
        ({"sram_kib": [64, "many"]}, "sram_kib: many: .*must be number, not 'many'"),
        ({"sram_kib": [0]}, "must be above 0, not 0"),
        ({"engines.general.rows": [8.5]}, "must be integer, not 8.5"),
        ({"sram_kib": {"low": 200, "high": 100, "step": 1}}, "the range from 200 to 100 is empty"),
        ({"sram_kib": {"low": 1, "high": 2}}, "a range has low, high and step .*, not low, high"),
        ({"sram_kib": {"low": 1, "high": 2, "step": 0}}, "step must be above 0, not 0"),
        ({"sram_kib": {"low": 1, "high": 2, "factor": 1}}, "factor must be above 1 and low above 0, not 1 and 1"),
        ({"sram_kib": {"low": 1, "high": "x", "step": 1}}, "high must be a number, not 'x'"),
        ({"sram_kib": {"low": 1, "high": 1e9, "step": 1}}, "has 1,000,000,000 values; 1,000 at most"),
        ({"sram_kib": [1], "dram.gb_per_s, sram_kib": [2]}, "sram_kib is there twice"),
        ({"schedule": ["vitalty"]}, "did you mean 'vitality'"),
        ({"engines.general.dataflows": [["wieght"]]}, "must be one of"),
        ({"dram.energy": ["ddr9"]}, "ddr9"),
        ({"title": ["x"]}, "changes nothing"),
    ],
)
def test_bad_spaces_are_refused_by_name(space, message):
    with pytest.raises(InputError, match=message):
        read(space, VITALITY)


def test_a_file_is_named_when_it_is_wrong(tmp_path):
    (tmp_path / "s.yaml").write_text("sram_kib: {low: 3, high: 2, step: 1}\n")
    with pytest.raises(InputError, match=r"s\.yaml.*from 3 to 2 is empty"):
        read(tmp_path / "s.yaml", VITALITY)
    (tmp_path / "s.yaml").write_text("[1]\n")
    with pytest.raises(InputError, match=r"s\.yaml' must map places of the hardware"):
        read(tmp_path / "s.yaml", VITALITY)
    with pytest.raises(InputError, match=r"none\.yaml.* does not exist"):
        read(tmp_path / "none.yaml", VITALITY)


def test_differences_name_the_place_and_both_values():
    old, new = {"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": "x"}
    assert differences(old, new) == ["a.c: [1], now [2]", "d: 2, now none", 'e: none, now "x"']
