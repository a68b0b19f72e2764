"""The picture of an exploration: what is in it, and that odd explorations can be drawn."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from vitrify.accelerator.explore.space import Space
from vitrify.accelerator.explore.trials import QUANTITIES, Exploration, Trial, read_constraint
from vitrify.accelerator.hardware import load
from vitrify.report.figures import save_png
from vitrify.report.pareto import LABELS, pareto


def trial(latency, area, status="done"):
    values = dict.fromkeys(QUANTITIES, 1.0) | {"latency_ms": latency, "total_mm2": area}
    return Trial(design={"sram_kib": 100}, status=status, quantities=values if status == "done" else {})


def exploration(trials, start=None, constraints=()):
    limits = [read_constraint(text) for text in constraints]
    return Exploration(
        load("vitality"), Space({"sram_kib": (100,)}), ["latency_ms"], limits, start or trial(2, 2), trials
    )


def drawn(figure):
    """Label -> points, sorted."""
    (axes,) = figure.axes
    found = {c.get_label(): sorted(map(tuple, c.get_offsets().tolist())) for c in axes.collections}
    found |= {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    return found


def test_every_kind_of_point_is_where_it_belongs(tmp_path):
    trials = [trial(1, 3), trial(2, 2.5), trial(3, 1), trial(2.5, 2.7), trial(0.5, 9), trial(0, 0, "refused")]
    found = drawn(figure := pareto(exploration(trials, constraints=["total_mm2<=4"]), "mini on vitality"))
    assert found["designs"] == [(1, 3), (2, 2.5), (2.5, 2.7), (3, 1)]
    assert found["Pareto front"] == [(1, 3), (2, 2.5), (3, 1)]
    assert found["breaks total_mm2<=4"] == [(0.5, 9)]
    assert found["start"] == [(2, 2)]
    assert found["best"] == [(1, 3)]
    (axes,) = figure.axes
    limit = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert list(limit.get_ydata()) == [4, 4]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency, ms (lower is better)", "area, mm² (lower is better)")
    save_png(figure, tmp_path / "p.png")
    assert to_hex(axes.lines[0].get_color()) == "#e0791b"


def test_wide_ranges_are_logarithmic_and_narrow_ones_are_not():
    (axes,) = pareto(exploration([trial(1, 3), trial(100, 2.5)]), "").axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


@pytest.mark.parametrize(
    ("trials", "start", "constraints"),
    [
        ([trial(0, 0, "refused")], trial(0, 0, "refused"), ()),
        ([trial(1, 3)], trial(0, 0, "refused"), ()),
        ([trial(1, 3)], trial(2, 2), ["total_mm2<=1"]),
    ],
    ids=["nothing", "no start", "none within the constraints"],
)
def test_explorations_that_found_little(trials, start, constraints, tmp_path):
    found = exploration(trials, start, constraints)
    save_png(pareto(found, "little"), tmp_path / "p.png")
    assert ("best" in drawn(pareto(found, ""))) == (found.best is not None)


def test_every_quantity_has_a_label():
    assert set(LABELS) == set(QUANTITIES)
