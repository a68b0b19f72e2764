"""Hardware descriptions: what ships is complete, and what is wrong is named."""

from __future__ import annotations

import pytest
import yaml

from vitrify.accelerator.budget import matched, sides
from vitrify.accelerator.hardware import PRESETS, describe, load, names, parse
from vitrify.accelerator.prices import Prices
from vitrify.errors import InputError


def data(**changes):
    return {**yaml.safe_load((PRESETS / "vitality.yaml").read_text()), **changes}


@pytest.mark.parametrize("name", names())
def test_presets_survive_a_round_trip_and_say_where_figures_come_from(name):
    hardware = load(name)
    again = parse(describe(hardware), name)
    assert again == hardware
    assert hardware.standing_of("clock_mhz") in ("published", "recalled", "derived", "assumed")


def test_the_papers_values_are_marked_as_recalled():
    vitality = load("vitality")
    assert vitality.standing_of("engines.general.rows") == "recalled"
    assert vitality.standing_of("engines.special.lanes") == "assumed"
    assert vitality.dram_bits_per_cycle == pytest.approx(1228.8)


def test_the_affine_form_takes_no_more_area_than_what_it_drops():
    areas = {name: sum(Prices(load(name)).areas().values()) for name in ("vitality", "vitality-affine")}
    assert areas["vitality-affine"] <= areas["vitality"]
    assert load("vitality-affine").arrays["general"].pes > load("vitality").arrays["general"].pes


def test_areas_agree_with_those_measured_on_netlists():
    """A PE of the measured 45 nm library: 3.24 mm2 for 64 x 64, about 1.22 mm2 at 28 nm."""
    assert Prices(load("vitality")).areas()["general"] == pytest.approx(1.22, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clock_mhz": 0}, r"clock_mhz must be above 0"),
        ({"clock": 5}, r"\.clock is unknown"),
        ({"sram_kib": "much"}, r"sram_kib must be number"),
        ({"engines": {"a": {"kind": "systolic", "rows": 4}}}, r"engines\.a, of kind systolic: .*columns"),
        ({"engines": {"a": {"kind": "lanes", "lanes": 0, "does": ["add"]}}}, r"engines\.a\.lanes must be at least 1"),
        ({"engines": {"a": {"kind": "lanes", "lanes": 4, "does": ["ad"]}}}, r"engines\.a\.does\[0\] must be one of"),
        ({"engines": {"a": {"kind": "lanes", "lanes": 4, "does": ["add"], "rows": 2}}}, r"engines\.a, of kind lanes"),
        ({"standing": {}}, r"does not say where clock_mhz comes from"),
        ({"standing": {"assumed": ["clock"]}}, r"did you mean 'clock_mhz'"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        parse(data(**changes), "mine")


def test_unknown_names_and_missing_files(tmp_path):
    with pytest.raises(InputError, match="did you mean 'vitality'"):
        load("vitalty")
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load(tmp_path / "nowhere.yaml")


def test_changed_figures_stand_as_assumed():
    changed = load("vitality").with_({"engines.general.rows": 32, "numbers.activation_bits": 6})
    assert changed.arrays["general"].pes == 32 * 64
    assert changed.standing_of("engines.general.rows") == "assumed"
    renamed = changed.with_({"schedule": "systolic", "engines.general.dataflows": ["output"]})
    assert parse(describe(renamed), renamed.name) == renamed
    with pytest.raises(InputError, match=r"engines\.general\.rows must be at least 1"):
        changed.with_({"engines.general.rows": 0})
    with pytest.raises(InputError, match=r"did you mean 'engines\.general\.rows'"):
        changed.with_({"engines.generl.rows": 8})


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("by", ["area", "macs"])
def test_budgets_are_kept_and_used(name, by):
    vitality = load("vitality")
    found = matched(load(name), vitality, by)
    if by == "area":
        spent, budget = (sum(Prices(h).areas().values()) for h in (found, vitality))
    else:
        spent, budget = (sum(a.pes for n, a in h.arrays.items() if n != "predictor") for h in (found, vitality))
    assert 0.9 * budget <= spent <= budget
    assert (found.clock_mhz, found.sram_kib, found.dram) == (vitality.clock_mhz, vitality.sram_kib, vitality.dram)


def test_what_does_not_fit_a_budget_is_refused():
    tiny = load("vitality").with_({"engines.general.rows": 1, "engines.general.columns": 1, "sram_kib": 1})
    with pytest.raises(InputError, match=r"'shiftadd' exceeds the area of 'vitality'"):
        matched(load("shiftadd"), tiny.with_({"engines.special.lanes": 1}), "area")
    with pytest.raises(InputError, match="unknown budget"):
        matched(load("shiftadd"), tiny, "power")


def test_sides_never_exceed_what_was_asked():
    for pes in (1, 2, 3, 17, 100, 1000, 4096, 5000):
        rows, columns = sides(pes)
        assert rows * columns <= pes
        assert rows * columns > 0.75 * pes or pes < 10
