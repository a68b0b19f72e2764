"""Explorations find what simulating by hand finds, go on where they stopped, and refuse what is another's."""

from __future__ import annotations

import csv
import itertools
import json

import pytest
from small_workloads import chain, machine

from vitrify.accelerator.explore import explore, workers
from vitrify.accelerator.explore.folder import opened
from vitrify.accelerator.explore.samplers import count_trials
from vitrify.accelerator.explore.space import read
from vitrify.accelerator.explore.trials import read_constraint, read_objectives
from vitrify.accelerator.hardware import describe, parse
from vitrify.accelerator.simulate import simulate
from vitrify.errors import InputError, VitrifyError

WORKLOAD = chain(40, [48, 64, 32])
SIDES = "engines.array.rows, engines.array.columns"
SPACE = {SIDES: [4, 8, 16], "sram_kib": [11, 64]}


@pytest.fixture
def simulated(monkeypatch):
    """The hardware of every simulation that is done from now on."""
    seen = []

    def noted(workload, hardware, **options):
        seen.append((hardware.arrays["array"].rows, hardware.sram_kib))
        return simulate(workload, hardware, **options)

    monkeypatch.setattr(workers, "simulate", noted)
    return seen


def run(folder, space=SPACE, workload=WORKLOAD, hardware=None, **options):
    options = {"sampler": "grid", **options}
    return explore(workload, hardware or machine(rows=16, columns=16), space, folder, **options)


def by_hand():
    """(sides, KiB) -> the result of simulating that design."""
    return {
        (sides, kib): simulate(WORKLOAD, machine(rows=sides, columns=sides, kib=kib))
        for sides, kib in itertools.product(SPACE[SIDES], SPACE["sram_kib"])
    }


def test_a_grid_finds_what_simulating_by_hand_finds(tmp_path):
    found, results = run(tmp_path), by_hand()
    designs = [tuple(trial.design.values()) for trial in found.trials]
    assert designs == list(results)
    for trial, result in zip(found.trials, results.values(), strict=True):
        assert trial.quantities["cycles"] == result.cycles
        assert trial.quantities["latency_ms"] == pytest.approx(result.cycles / (result.hardware.clock_mhz * 1e3))
        assert trial.quantities["energy_mj"] == pytest.approx(result.total_pj * 1e-9)
        assert trial.quantities["chip_mj"] < trial.quantities["energy_mj"]
        power = trial.quantities["energy_mj"] / trial.quantities["latency_ms"]
        assert trial.quantities["power_w"] == pytest.approx(power)
    best = min(results, key=lambda design: results[design].cycles)
    assert tuple(found.best.design.values()) == best
    assert found.start.quantities["cycles"] == results[16, 64].cycles


def test_the_front_is_what_no_other_design_beats(tmp_path):
    found = run(tmp_path, objective="latency,area", constraints=["latency_ms<=0.02"])
    x, y = found.plane
    assert (x, y) == ("latency_ms", "total_mm2")
    values = [(t.quantities[x], t.quantities[y]) for t in found.trials if t.quantities[x] <= 0.02]
    assert 0 < len(values) < len(found.trials)
    undominated = {a for a in values if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in values)}
    front = [(t.quantities[x], t.quantities[y]) for t in found.front]
    assert front == sorted(undominated)
    assert len(front) > 1
    product = min(values, key=lambda pair: pair[0] * pair[1])
    assert (found.best.quantities[x], found.best.quantities[y]) == product


def test_constraints_hold_for_the_best_and_are_said_where_they_do_not(tmp_path):
    free = run(tmp_path)
    limit = sorted(t.quantities["total_mm2"] for t in free.trials)[2]
    bound = run(tmp_path, constraints=[f"total_mm2<={limit}"])
    assert bound.best.quantities["total_mm2"] <= limit < free.best.quantities["total_mm2"]
    assert bound.broken(free.best) == [f"total_mm2<={limit:g}"]
    assert run(tmp_path, constraints=["total_mm2<=1e-6"]).best is None
    at_least = run(tmp_path, constraints=["latency_ms>=0.01"])
    assert at_least.best.quantities["latency_ms"] >= 0.01 > free.best.quantities["latency_ms"]


def test_the_objective_chooses_the_tiles(tmp_path):
    space = {"sram_kib": [200]}
    for objective, part in (("energy", "energy_mj"), ("edp", "edp_mj_ms")):
        trial = run(tmp_path / objective, space, objective=objective).best
        result = simulate(WORKLOAD, machine(kib=200), objective=objective)
        assert trial.quantities["energy_mj"] == result.total_pj * 1e-9
        assert trial.quantities[part] <= run(tmp_path / "latency", space).best.quantities[part]


def test_what_cannot_be_is_a_trial_with_its_reason(tmp_path):
    found = run(tmp_path, {"sram_kib": [1, 64]})
    assert [trial.status for trial in found.trials] == ["refused", "done"]
    assert "sram_kib of 1 is too small" in found.trials[0].reason
    assert found.best is found.trials[1]


def test_the_csv_has_every_trial_and_the_start(tmp_path):
    found = run(tmp_path, {"sram_kib": [1, 64], "engines.array.dataflows": [["weight"], ["output", "input"]]})
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["engines.array.dataflows"] for row in rows[1:3]] == ["weight", "output+input"]
    assert [row["status"] for row in rows] == ["done", "refused", "refused", "done", "done"]
    assert [row["on_front"] for row in rows].count("yes") == len(found.front)
    assert float(rows[4]["latency_ms"]) == found.trials[3].quantities["latency_ms"]


def test_random_designs_follow_from_the_seed_and_do_not_repeat(tmp_path):
    space = {SIDES: {"low": 2, "high": 16, "step": 1}, "sram_kib": [11, 20, 64]}
    first = run(tmp_path / "a", space, sampler="random", trials=6, seed=1)
    again = run(tmp_path / "b", space, sampler="random", trials=6, seed=1)
    other = run(tmp_path / "c", space, sampler="random", trials=6, seed=2)
    assert (tmp_path / "a/trials.csv").read_bytes() == (tmp_path / "b/trials.csv").read_bytes()
    assert first.trials == again.trials != other.trials
    assert len({tuple(trial.design.values()) for trial in first.trials}) == 6
    assert len(run(tmp_path / "d", sampler="random", trials=50).trials) == 6  # as many as there are


def test_more_trials_add_to_those_that_are_there(tmp_path, simulated):
    space = {SIDES: {"low": 2, "high": 16, "step": 1}}
    few = run(tmp_path, space, sampler="random", trials=3)
    simulated.clear()
    more = run(tmp_path, space, sampler="random", trials=5)
    assert more.trials[:3] == few.trials
    assert len(simulated) <= 2


def test_a_stopped_exploration_does_only_what_is_left(tmp_path, simulated):
    whole = run(tmp_path)
    assert len(simulated) == 6  # the start is one of the grid's
    lines = (tmp_path / "trials.jsonl").read_bytes().splitlines(keepends=True)
    table = (tmp_path / "trials.csv").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])
    simulated.clear()
    told = []
    again = run(tmp_path, progress=lambda done, total, outcome: told.append((done, total)))
    assert again.trials == whole.trials
    assert (tmp_path / "trials.csv").read_bytes() == table
    assert len(simulated) == 3
    assert told == [(done, 6) for done in range(1, 7)]
    assert sorted((tmp_path / "trials.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_an_interruption_keeps_what_is_finished(tmp_path, simulated):
    def stop(done, total, outcome):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=stop)
    assert not (tmp_path / "trials.csv").exists()
    finished = len((tmp_path / "trials.jsonl").read_text().splitlines())
    simulated.clear()
    run(tmp_path)
    assert len(simulated) == 6 - finished


def test_a_fault_of_the_simulator_costs_one_design_and_is_tried_again(tmp_path, monkeypatch):
    def faulty(workload, hardware, **options):
        if hardware.arrays["array"].rows == 8 and hardware.sram_kib == 64:
            raise ZeroDivisionError("float division by zero")
        return simulate(workload, hardware, **options)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "simulate", faulty)
        found = run(tmp_path)
    assert [t.design for t in found.trials if t.status == "failed"] == [{SIDES: 8, "sram_kib": 64}]
    assert [t.reason for t in found.trials if t.reason] == ["ZeroDivisionError: float division by zero"]
    assert {t.status for t in run(tmp_path).trials} == {"done"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"space": {**SPACE, "sram_kib": [64, 128]}}, r"space\.sram_kib: \[11, 64\], now \[64, 128\]"),
        ({"hardware": machine(gb_per_s=9.0)}, r"hardware\.dram\.gb_per_s: 8\.0, now 9\.0"),
        ({"workload": chain(41, [48, 64, 32])}, "model: .*input 40 x 48.*, now .*41 x 48"),
        ({"workload": chain(40, [48, 65, 32])}, "workload: "),
        ({"objective": "energy"}, 'tiles by: "latency", now "energy"'),
        ({"sampler": "random"}, 'sampler: "grid", now "random"'),
    ],
)
def test_the_folder_of_another_exploration_is_refused_and_stays(changed, message, tmp_path):
    run(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=f"holds another exploration.*{message}"):
        run(tmp_path, **changed)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_simulator_s_results_are_not_mixed_in(tmp_path, monkeypatch):
    run(tmp_path)
    (tmp_path / "tables").mkdir()
    monkeypatch.setattr("vitrify.accelerator.explore.run.TABLES", tmp_path / "tables")
    with pytest.raises(InputError, match='simulator: "'):
        run(tmp_path)


def test_folders_that_are_no_exploration_s(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds thesis\.tex, but is not the folder of an exploration"):
        run(tmp_path / "taken")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        run("/proc/exploration")


def test_two_processes_cannot_write_into_one_folder(tmp_path):
    identity = {"vitrify": "x"}
    with opened(tmp_path, identity), pytest.raises(InputError, match="another process"), opened(tmp_path, identity):
        pass


def test_a_line_that_is_no_trial_is_named(tmp_path):
    run(tmp_path)
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(VitrifyError, match=r"trials\.jsonl, line 7 is no trial"):
        run(tmp_path)


def test_the_best_design_is_a_description_that_loads(tmp_path):
    found = run(tmp_path, {"schedule": ["systolic"], "engines.array.in_place": [True], "sram_kib": [100]})
    best = found.hardware_of(found.best, "best")
    again = parse(json.loads(json.dumps(describe(best))), "best")
    assert again == best
    assert (again.sram_kib, again.arrays["array"].in_place, again.standing_of("sram_kib")) == (100, True, "assumed")
    assert simulate(WORKLOAD, again).cycles == found.best.quantities["cycles"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "speed"}, "unknown objective 'speed'"),
        ({"objective": "latency,energy,area"}, "one objective, or two"),
        ({"objective": "latency,latency"}, "one objective, or two"),
        ({"constraints": ["mm2<=3"]}, "unknown quantity in constraint 'mm2<=3'"),
        ({"constraints": ["area<=3"]}, "area is total_mm2 here"),
        ({"constraints": ["total_mm2=3"]}, "QUANTITY<=NUMBER"),
        ({"constraints": ["total_mm2<=big"]}, "QUANTITY<=NUMBER"),
        ({"constraints": ["total_mm2<=nan"]}, "QUANTITY<=NUMBER"),
        ({"sampler": "bayes"}, "unknown sampler 'bayes'"),
        ({"trials": 3}, "a grid tries all 6 designs"),
        ({"sampler": "random", "trials": 0}, "at least 1, not 0"),
        ({"workers": 0}, "at least 1, not 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_grid_too_large_is_refused():
    wide = {"low": 1, "high": 400, "step": 1}
    space = read({"engines.array.rows": wide, "engines.array.columns": wide}, machine())
    with pytest.raises(InputError, match="160,000 designs, above 100,000"):
        count_trials("grid", space, None)
    assert count_trials("random", space, None) == 100


def test_constraints_and_objectives_read_as_they_are_written():
    assert str(read_constraint(" power_w >= 1.5 ")) == "power_w>=1.5"
    assert read_constraint("total_mm2<=2").excess({"total_mm2": 3.0}) == 0.5
    assert read_constraint("total_mm2>=2").excess({"total_mm2": 1.0}) == 0.5
    assert read_objectives("energy, area") == ("energy_mj", "total_mm2")
