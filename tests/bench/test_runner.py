import io
import json
import sys
import types

import pytest
import torch
from rich.console import Console

from vitrify import bench
from vitrify.bench import memory, registry, roofline, runner
from vitrify.bench.registry import Check, Contender, Prepared
from vitrify.bench.roofline import Cost, Roofline
from vitrify.bench.table import table


@pytest.fixture
def calls(monkeypatch):
    """Register a benchmark with one right, one wrong and one crashing contender; return how often each ran."""
    counts = {"right": 0, "quick": 0, "wrong": 0, "crash": 0}

    def contender(name, error):
        def run(argument):
            counts[name] += 1
            if name == "crash":
                raise RuntimeError("no kernel for this\nand a long story")

        def check(argument):
            run(argument)
            return Check(error, 1e-6, "the truth")

        return Contender(name, run, check, Cost(flops=2_000_000, bytes_moved=1_000))

    def prepare(case):
        contenders = [
            contender("right", 1e-7),
            contender("quick", 0.0),
            contender("wrong", float("nan")),
            contender("crash", 0.0),
        ]
        baselines = dict.fromkeys(counts, "right")
        return Prepared(lambda seed: seed, contenders, baselines, torch.device("cpu"), torch.float32, rotation=3)

    module = types.ModuleType("fake_benchmark")
    module.prepare = prepare
    monkeypatch.setitem(sys.modules, "fake_benchmark", module)
    monkeypatch.setitem(registry.BENCHMARKS, "fake", "fake_benchmark")
    monkeypatch.setattr(memory, "resident_peak_of", lambda module, request: 1.5)
    limits = iter([Roofline(10.0, 4.0, "float32"), Roofline(8.0, 5.0, "float32")])
    monkeypatch.setattr(roofline, "probe", lambda device, dtype, narrow: next(limits))
    return counts


def test_wrong_and_crashing_contenders_are_refused_and_never_timed(calls):
    result = bench.run("fake", [{"size": 1}], seconds=0)
    rows = {row.contender: row for row in result.rows}
    assert calls["wrong"] == calls["crash"] == 1  # the check alone
    assert [row.contender for row in result.refusals] == ["wrong", "crash"]
    assert "error nan (allowed 1.0e-06) against the truth" in rows["wrong"].refused
    assert "RuntimeError: no kernel for this" in rows["crash"].refused
    assert rows["wrong"].timing is rows["wrong"].peak_mib is rows["crash"].timing is None
    assert rows["right"].timing.rounds == rows["quick"].timing.rounds
    assert rows["right"].timed == "single calls"
    assert rows["wrong"].timed is None
    assert rows["right"].peak_mib == 1.5


def test_what_fails_only_when_it_is_timed_is_refused_too_whatever_it_raises(calls, monkeypatch):
    timer = runner._timer

    def failing(contender, inputs, device):
        if contender.name == "quick":
            raise AssertionError  # as Inductor does, without a word
        return timer(contender, inputs, device)

    monkeypatch.setattr(runner, "_timer", failing)
    rows = {row.contender: row for row in bench.run("fake", [{"size": 1}], seconds=0).rows}
    assert rows["quick"].refused == "not timed: AssertionError: "
    assert rows["quick"].timing is None
    assert rows["right"].timing is not None


def test_a_case_in_which_nobody_can_be_timed_ends_no_benchmark(calls, monkeypatch):
    monkeypatch.setattr(runner, "_check", lambda contender, argument: "no kernel for this")
    result = bench.run("fake", [{"size": 1}], seconds=0)
    assert [row.contender for row in result.refusals] == list(calls)


def test_contenders_are_compared_with_their_baseline_only(calls):
    rows = {row.contender: row for row in bench.run("fake", [{"size": 1}], seconds=0).rows}
    assert rows["right"].speedup is None
    assert rows["quick"].baseline == "right"
    assert rows["quick"].speedup.verdict in ("faster", "slower", "within noise")


def test_the_floor_takes_the_better_of_both_probes(calls):
    result = bench.run("fake", [{"size": 1}], seconds=0)
    assert (result.roofline.bandwidth_gb_s, result.roofline.peak_gflop_s) == (10.0, 5.0)
    assert result.roofline.floor_ms(Cost(flops=2_000_000, bytes_moved=1_000)) == pytest.approx(0.4)
    assert result.roofline.floor_ms(Cost(flops=0, bytes_moved=10_000_000)) == pytest.approx(1.0)


def test_the_file_names_the_machine_and_holds_everything(calls, tmp_path):
    result = bench.run("fake", [{"size": 1}, {"size": 2}], seconds=0, seed=7, command="vitrify bench fake")
    path = result.write(tmp_path / "new" / "folder")
    assert path.name == f"fake-{result.machine.slug}.json"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no draft left behind
    content = json.loads(path.read_text())
    assert content["command"] == "vitrify bench fake"
    assert content["seed"] == 7
    assert content["machine"]["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads", "isa", "gpu", "date"} <= content["machine"].keys()
    assert [row["case"]["size"] for row in content["rows"]] == [1] * 4 + [2] * 4
    right, quick, wrong, _ = content["rows"][:4]
    assert {"median_ms", "min_ms", "p10_ms", "p90_ms", "rounds"} == right["timing"].keys()
    assert quick["speedup"]["over"] == "right"
    assert wrong["timing"] is None
    assert right["floor_ms"] == pytest.approx(0.4)


def test_the_table_shows_refusals_and_only_what_varies(calls):
    result = bench.run("fake", [{"size": 1, "same": "x"}, {"size": 2, "same": "x"}], seconds=0)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(result))
    text = console.export_text()
    header = next(line for line in text.splitlines() if "contender" in line)
    assert "size" in header
    assert "same" not in header
    assert text.count("refused: not timed") == 4
    assert "same x" in text
