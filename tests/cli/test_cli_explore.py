"""`vitrify explore`: what it prints and writes, what it refuses, and that it survives being killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitrify.accelerator import explore as exploring
from vitrify.accelerator.explore import workers
from vitrify.accelerator.hardware import load
from vitrify.cli import main

MINI = "vit_mini_patch2_28"
SPACE = """
engines.general.rows, engines.general.columns: [16, 32]
sram_kib: [8, 64, 200]
"""


@pytest.fixture
def space(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE)
    return str(tmp_path / "space.yaml")


def explore(space, output, *arguments):
    command = ["explore", MINI, "--space", space, "--sampler", "grid", "--workers", "1", "-o", str(output)]
    return main([*command, *arguments])


def test_the_best_the_front_and_every_file(space, tmp_path, capsys):
    output = tmp_path / "new" / "out"
    assert explore(space, output, "--constraint", "total_mm2<=1.5", "--constraint", "power_w<=100") == 0
    captured = capsys.readouterr()
    assert "Pareto front, latency_ms against total_mm2" in captured.out
    assert "2 designs cannot be; 2 of them: hardware 'vitality': its sram_kib of 8 is too small" in captured.out
    best = next(line for line in captured.out.splitlines() if line.startswith("best"))
    assert best.startswith("best within total_mm2<=1.5, power_w<=100: latency_ms ")
    assert "by engines.general.rows, engines.general.columns 64 -> 32; sram_kib 200 -> 64" in captured.out
    assert "the start itself breaks total_mm2<=1.5" in captured.out
    assert "6 of 6: best latency_ms" in captured.err
    with (output / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    kept = [row for row in rows[1:] if row["keeps_constraints"] == "yes"]
    least = min(kept, key=lambda row: float(row["latency_ms"]))
    assert f"latency_ms {float(least['latency_ms']):.4g} (" in best
    assert load(output / "best.yaml").sram_kib == int(least["sram_kib"]) == 64
    assert (output / "pareto.png").read_bytes().startswith(b"\x89PNG")

    # The same command, once more: nothing is simulated again. Other constraints are no other exploration.
    lines = (output / "trials.jsonl").read_text()
    assert explore(space, output, "--constraint", "total_mm2<=0.1") == 0
    assert "no design of 6 keeps to total_mm2<=0.1" in capsys.readouterr().out
    assert (output / "trials.jsonl").read_text() == lines
    assert not (output / "best.yaml").exists()


def test_two_objectives(space, tmp_path, capsys):
    assert explore(space, tmp_path / "out", "--objective", "latency,power") == 0
    shown = capsys.readouterr().out
    assert "Pareto front, latency_ms against power_w" in shown
    assert "best: latency_ms" in shown


def test_without_matplotlib_all_but_the_picture(space, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "vitrify.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert explore(space, tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert "not written: pareto.png needs matplotlib: pip install 'vitrify[report]'" in captured.err
    assert "best.yaml" in captured.out
    assert not (tmp_path / "out" / "pareto.png").exists()


def test_a_fault_of_the_simulator_ends_with_1_after_the_results(space, tmp_path, capsys, monkeypatch):
    right = workers.simulate

    def faulty(workload, hardware, **options):
        if hardware.sram_kib == 64:
            raise ZeroDivisionError("division by zero")
        return right(workload, hardware, **options)

    monkeypatch.setattr(workers, "simulate", faulty)
    assert explore(space, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert "best: latency_ms" in captured.out
    assert "2 designs made the simulator fail, the first by ZeroDivisionError: division by zero" in captured.err


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(space, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(exploring, "explore", stop)
    assert explore(space, tmp_path / "out") == 130
    assert f"the same command goes on from {tmp_path / 'out'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "speed"], "unknown objective 'speed'"),
        (["--constraint", "mm2<=3"], "unknown quantity in constraint 'mm2<=3'"),
        (["--hardware", "vitalty"], "did you mean 'vitality'"),
        (["--hardware", "systolic"], "unknown place in hardware 'systolic'"),
        (["--sampler", "bayes"], "unknown sampler 'bayes'"),
        (["--trials", "5"], "a grid tries all 6 designs, not 5"),
        (["--workers", "0"], "at least 1, not 0"),
        (["--recipe", "vitalty"], "did you mean 'vitality'"),
        (["--taylor", "second"], "unknown taylor form 'second'"),
        (["--space", "none.yaml"], "space 'none.yaml' does not exist"),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(arguments, message, space, tmp_path, capsys):
    assert explore(space, tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["optuna", "ray"])
def test_an_extra_that_is_not_installed_is_named(package, space, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["--sampler", "optuna"] if package == "optuna" else ["--ray", "auto"]
    assert explore(space, tmp_path / "out", *arguments) == 2
    extra = {"optuna": "explore", "ray": "ray"}[package]
    assert f"needs {package}: pip install 'vitrify[{extra}]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_exploration_s_folder_is_refused(space, tmp_path, capsys):
    output = tmp_path / "out"
    assert explore(space, output) == 0
    Path(space).write_text(SPACE.replace("200", "300"))
    assert explore(space, output) == 2
    assert "holds another exploration. space.sram_kib: [8, 64, 200], now [8, 64, 300]" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_trials(tmp_path):
    """SIGKILL to the process that hands out the work: its workers end too, and what was finished is not done again."""
    places = {"engines.general.rows": [16, 24, 32, 48], "engines.general.columns": [16, 32, 64], "sram_kib": [100, 200]}
    (tmp_path / "space.json").write_text(json.dumps(places))
    command = [sys.executable, "-m", "vitrify", "explore", MINI, "--space", str(tmp_path / "space.json")]
    command += ["--sampler", "random", "--trials", "20", "--workers", "2", "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)

    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = wait_for_trials(killed / "trials.jsonl", 5, process)
    offspring = children(process.pid)
    assert len(offspring) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "trials.csv").exists()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{child}") for child in offspring) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [child for child in offspring if os.path.exists(f"/proc/{child}")] == []

    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    assert (killed / "trials.csv").read_bytes() == (tmp_path / "whole" / "trials.csv").read_bytes()
    after = (killed / "trials.jsonl").read_text().splitlines()
    assert after[: len(lines)] == lines
    designs = [json.dumps(json.loads(line)["design"]) for line in after]
    assert len(designs) == len(set(designs))


def wait_for_trials(file, count, process):
    """Wait until so many trials are there, and return those."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) >= count:
            return lines[:count]
        time.sleep(0.02)
    pytest.fail("no trials in time")


def children(pid):
    """Return the ids of all processes that descend from one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, new = set(), {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - found
        found |= new
    return found


def test_the_help_teaches(capsys):
    assert main(["explore", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("schedule: [vitality, vitality-affine]", "total_mm2<=3", "Stopped at any moment", "best.yaml"):
        assert text in shown
