"""The tables of benchmarks/README.md come from the results beside it."""

import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vitrify.cli import main

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
runs, tables = (importlib.import_module(name) for name in ("runs", "tables"))
sys.path.remove(str(BENCHMARKS))

MACHINE = {"device": "cpu", "cpu": "C", "cores": 2, "gpu": None, "versions": {"torch": "2"}, "threads": 2}
MACHINE |= {"isa": "AVX2", "load_average": 0.1, "date": "today"}
TIMING = {"median_ms": 2.0, "p10_ms": 1.5, "p90_ms": 3.0}


def row(rows, contender, **kwargs):
    case = {"rows": rows, "dtype": "float32"}
    empty = {"timing": None, "speedup": None, "floor_ms": None, "refused": None, "not_run": None}
    return {"case": case, "contender": contender, **empty, **kwargs}


def test_the_readme_holds_the_tables_of_the_results():
    readme = (BENCHMARKS / "README.md").read_text()
    assert tables.tables(BENCHMARKS) in readme, "run: python benchmarks/tables.py"


def test_rows_show_what_was_measured_and_what_was_not(tmp_path):
    rows = [
        row(1, "plain", timing=TIMING, floor_ms=1.0),
        row(2, "plain", timing=TIMING, floor_ms=0.75),
        row(2, "ours", timing=TIMING, floor_ms=0.5, speedup={"ratio": 1.25, "verdict": "faster", "over": "plain"}),
        row(2, "absent", not_run="no such machine"),
        row(2, "wrong", refused="not timed: error 1"),
    ]
    result = {"benchmark": "shift", "command": "vitrify bench shift", "machine": MACHINE, "rows": rows}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "shift-c.json").write_text(json.dumps(result))
    text = tables.tables(tmp_path)
    assert "| 1 | plain | 2 | 1.5 to 3 |  |  | 1 | 50 % |" in text
    assert "| 2 | ours | 2 | 1.5 to 3 | 1.25x, faster | 1.50x | 0.5 | 25 % |" in text
    assert "| 2 | absent | not run: no such machine |" in text
    assert "| 2 | wrong | refused: not timed: error 1 |" in text
    assert "### shift, C, 2 cores" in text
    assert "### shift, CPU" not in text
    assert "### attention, CPU" in text
    assert "`vitrify bench attention --output benchmarks/results`: not measured." in text
    assert "`make bench-gpu`: not measured, 12 in `results/shift`." in text


def test_results_of_a_gpu_stand_with_the_runs_of_a_gpu(tmp_path):
    run = next(run for run in runs.GPU if run.benchmark == "hamming")
    rows = [row(1, "plain", timing=TIMING, floor_ms=1.0)]
    machine = {**MACHINE, "device": "cuda", "gpu": "Some GPU"}
    result = {"benchmark": "hamming", "command": run.command, "machine": machine, "rows": rows}
    (tmp_path / run.where).mkdir(parents=True)
    (tmp_path / run.where / "hamming-some-gpu.json").write_text(json.dumps(result))
    text = tables.tables(tmp_path)
    assert "### hamming, Some GPU" in text
    assert "### hamming, CPU" in text
    assert "### hamming, GPU" not in text
    assert run not in runs.missing(tmp_path, "some-gpu")
    assert run in runs.missing(tmp_path, "another-gpu")


def test_every_run_has_its_own_result_and_a_command_that_is_understood(monkeypatch):
    for kind in (runs.CPU, runs.GPU):
        assert len({(run.benchmark, run.where) for run in kind}) == len(kind)
    chosen = []
    monkeypatch.chdir(BENCHMARKS.parent)
    monkeypatch.setattr("vitrify.cli.bench._run", lambda name, cases, **_: chosen.append((name, cases)))
    for run in (*runs.CPU, *runs.GPU):
        assert main(shlex.split(run.command)[1:]) == 0, run.command
    # What the issue of the benchmarks lists for a GPU.
    gpu = [(name, case) for name, cases in chosen[len(runs.CPU) :] for case in cases]
    attention = {(c["tokens"], c["heads"] * c["head_dim"], c["backward"]) for name, c in gpu if name == "attention"}
    lengths, widths = (197, 577, 1024, 4096, 16384), (384, 768, 1024)
    assert attention == {(n, width, backward) for n in lengths for width in widths for backward in (False, True)}
    models = {(c["model"], c["image_size"], c["batch_size"]) for name, c in gpu if name == "models"}
    assert models == {(*model, batch) for model in runs.MODELS for batch in (1, 32)}
    shapes = [(c["rows"], c["inputs"], c["outputs"]) for name, c in gpu if name == "shift"]
    assert sorted(shapes) == sorted(runs.shift.FULL)
    splits = [(c["rows"], c["inputs"], c["outputs"], c["multiply"]) for name, c in gpu if name == "mixture"]
    assert sorted(splits) == sorted(runs.mixture.FULL)


def test_what_is_missing_is_measured_and_failures_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runs, "describe", lambda device: type("Machine", (), {"slug": "some-gpu"}))
    monkeypatch.setattr(runs, "HERE", tmp_path)
    monkeypatch.setattr(runs, "GPU", runs.GPU[:3])
    done = runs.GPU[1]
    (tmp_path / done.where).mkdir(parents=True)
    (tmp_path / done.where / f"{done.benchmark}-some-gpu.json").write_text("{}")
    started = []

    def start(command, **_):
        started.append(" ".join(command[2:]))
        return subprocess.CompletedProcess(command, returncode=len(started) - 1)

    monkeypatch.setattr(runs.subprocess, "run", start)
    assert runs.main() == 1
    assert started == [runs.GPU[0].command, runs.GPU[2].command]
    assert f"failed, or wrong output refused: {runs.GPU[2].command}" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    assert runs.main() == 2
    assert "no CUDA GPU" in capsys.readouterr().err
