"""Target files: what ships, what a user's file may say, and how a faulty one is refused."""

import re

import pytest
import yaml

from vitrify import InputError
from vitrify.cost import target_file
from vitrify.cost.target_file import DTYPES, load, names


def own(tmp_path, **changes):
    """A file that extends the H100 and changes entries, given as section_name=fields."""
    data = {"extends": "h100", "sources": {"mine": "a stopwatch"}}
    for key, fields in changes.items():
        section, _, name = key.partition("_")
        data.setdefault(section, {})[name] = fields
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def entry(value, unit, **others):
    return {"value": value, "unit": unit, "source": "mine", "status": "measured", **others}


@pytest.mark.parametrize("name", names())
def test_every_figure_has_a_source_and_is_plausible(name):
    target = load(name)
    assert all(figure.source for figure in target.entries.values())
    assert all(figure.how for figure in target.entries.values() if figure.status in ("assumed", "fitted", "derived"))
    # Narrower formats are never slower, memory holds a model, and no kernel reaches more than the peak.
    peaks = {
        DTYPES[dtype]: target.si(f"peak.{dtype}") for dtype in ("fp32", "bf16", "int8") if f"peak.{dtype}" in target
    }
    assert sorted(peaks.values()) == [peaks[width] for width in sorted(peaks, reverse=True)]
    assert target.si("memory.size") > 1e9
    assert all(0 < figure.value <= 1 for key, figure in target.entries.items() if key.startswith("efficiency."))


def test_the_listed_targets_ship():
    assert {"a100", "cpu", "h100", "h200", "jetson_tx2", "rtx3090"} == set(names())
    assert load("h200").si("peak.fp8") == load("h100").si("peak.fp8")
    assert load("h200").machine != load("h100").machine


def test_units_become_si(tmp_path):
    target = load(
        own(tmp_path, launch_eager=entry(3, "us"), bandwidth_memory=entry(400, "GB/s"), peak_int8=entry(2, "TOP/s"))
    )
    assert target.si("launch.eager") == pytest.approx(3e-6)
    assert (target.si("bandwidth.memory"), target.si("peak.int8")) == (400e9, 2e12)
    assert target.si("peak.bf16") == load("h100").si("peak.bf16")
    assert target.machine == ""  # the benchmarks of the machine that it extends are not its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_fp4": entry(1, "TFLOP/s")}, "unknown key in peak 'fp4'"),
        ({"launch_eager": entry(-1, "us")}, "launch.eager.value must not be negative, not -1"),
        ({"launch_eager": entry(1, "parsecs")}, "launch.eager.unit must be us, ms or s, not 'parsecs'"),
        ({"launch_eager": {"value": 1, "source": "mine", "status": "measured"}}, "launch.eager has no unit"),
        ({"bandwidth_memory": entry(0, "GB/s")}, "bandwidth.memory.value must be more than 0"),
        ({"peak_fp32": entry("fast", "TFLOP/s")}, "peak.fp32.value must be a number, not 'fast'"),
        ({"peak_fp32": entry(1, "TFLOP/s", status="guessed")}, "peak.fp32.status must be 'published' or 'measured'"),
        ({"peak_fp32": entry(1, "TFLOP/s", status="assumed")}, "peak.fp32 is assumed: `how` names the method"),
        ({"wings_left": entry(1, "us")}, "unknown key 'wings'"),
    ],
)
def test_a_faulty_file_is_refused_by_file_and_key(tmp_path, changes, message):
    path = own(tmp_path, **changes)
    with pytest.raises(InputError, match=f"target '{re.escape(path)}': .*{re.escape(message)}"):
        load(path)


def test_an_unknown_target_lists_those_there_are():
    with pytest.raises(InputError, match=r"unknown target 'h101'.*Known: a100, cpu, h100, h200, jetson_tx2, rtx3090"):
        load("h101")


def test_a_file_that_extends_nothing_must_be_whole(tmp_path):
    path = tmp_path / "part.yaml"
    path.write_text("title: a part\ndtype: fp32\n")
    with pytest.raises(InputError, match=r"lacks vector.arithmetic.*a file that says `extends: cpu`"):
        load(path)


def test_files_that_extend_each_other(tmp_path):
    path = tmp_path / "loop.yaml"
    path.write_text(f"extends: {path}\n")
    with pytest.raises(InputError, match=r"circle"):
        load(path)


def test_a_figure_that_a_target_lacks_is_named():
    with pytest.raises(InputError, match=r"target 'jetson_tx2' has no peak for fp8: it has fp32, fp16"):
        load("jetson_tx2").si("peak.fp8")
    assert target_file.FORM.what == "target"
