"""Optuna's samplers, and who simulates: none of it changes what is found."""

from __future__ import annotations

import itertools
import time

import pytest
from small_workloads import chain, machine

from vitrify.accelerator.explore import explore, workers
from vitrify.accelerator.simulate import simulate
from vitrify.errors import InputError, VitrifyError

WORKLOAD = chain(40, [48, 64, 32])
SIDES = "engines.array.rows, engines.array.columns"
SPACE = {
    SIDES: {"low": 2, "high": 24, "step": 1},
    "sram_kib": [1, 11, 20, 64],
    "engines.array.dataflows": [["weight"], ["output"], ["input"]],
    "dram.gb_per_s": [1, 2, 4, 8],
}


def run(folder, space=SPACE, **options):
    return explore(WORKLOAD, machine(rows=16, columns=16), space, folder, **options)


class TestOptuna:
    @pytest.fixture(autouse=True)
    def _needs_optuna(self):
        pytest.importorskip("optuna", reason="needs optuna: pip install 'vitrify[explore]'")

    @pytest.mark.parametrize("objective", ["latency", "latency,area"])
    def test_the_same_seed_finds_the_same_designs(self, objective, tmp_path):
        options = {"sampler": "optuna", "trials": 24, "objective": objective}
        first = run(tmp_path / "a", seed=3, **options)
        again = run(tmp_path / "b", seed=3, **options)
        other = run(tmp_path / "c", seed=4, **options)
        assert first.trials == again.trials != other.trials
        assert len({str(trial.design) for trial in first.trials}) == 24

    @pytest.mark.parametrize("objective", ["latency", "energy,area"])
    def test_stopped_it_goes_on_to_the_same_designs(self, objective, tmp_path, monkeypatch):
        options = {"sampler": "optuna", "trials": 40, "objective": objective, "constraints": ["power_w<=0.5"]}
        whole = run(tmp_path, **options)
        lines = (tmp_path / "trials.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "trials.jsonl").write_text("".join(lines[:21]))
        seen = []
        monkeypatch.setattr(workers, "simulate", lambda *a, **k: (seen.append(1), simulate(*a, **k))[1])
        assert run(tmp_path, **options).trials == whole.trials
        assert len(seen) == len(lines) - 21

    def test_it_beats_random_designs_within_a_limit(self, tmp_path):
        """TPE, over three seeds: faster designs than as many random ones, and more of them within the area."""
        least, within = {}, {}
        for sampler in ("optuna", "random"):
            options = {"sampler": sampler, "trials": 64, "constraints": ["total_mm2<=0.9"]}
            found = [run(tmp_path / f"{sampler}{seed}", seed=seed, **options) for seed in range(3)]
            least[sampler] = sum(f.best.quantities["latency_ms"] for f in found)
            within[sampler] = sum(f.keeps(trial) for f in found for trial in f.trials)
        assert least["optuna"] < least["random"]
        assert within["optuna"] > within["random"]

    def test_a_space_smaller_than_the_trials_is_exhausted(self, tmp_path):
        space = {"sram_kib": [1, 64], "engines.array.in_place": [False, True], "dram.gb_per_s": [4]}
        found = run(tmp_path, space, sampler="optuna", trials=30, objective="latency,energy")
        designs = [tuple(trial.design.values()) for trial in found.trials]
        assert sorted(designs) == sorted(itertools.product([1, 64], [False, True], [4]))

    def test_other_objectives_are_another_exploration(self, tmp_path):
        run(tmp_path, sampler="optuna", trials=2)
        with pytest.raises(InputError, match="objective: "):
            run(tmp_path, sampler="optuna", trials=2, objective="latency,area")


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    options = {"sampler": "random", "trials": 12}
    run(tmp_path / "one", **options)
    run(tmp_path / "two", workers=2, **options)
    assert (tmp_path / "one/trials.csv").read_bytes() == (tmp_path / "two/trials.csv").read_bytes()


@pytest.mark.slow
def test_a_worker_that_dies_is_said_and_what_is_finished_is_kept(tmp_path):
    import multiprocessing  # noqa: PLC0415

    def kill(done, total, outcome):
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(VitrifyError, match="a worker was killed"):
        run(tmp_path, workers=2, trials=40, progress=kill)
    assert (tmp_path / "trials.jsonl").read_text().endswith("}\n")
    assert len(run(tmp_path, trials=40).trials) == 40


@pytest.mark.slow
def test_a_ray_cluster_finds_what_one_process_finds(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'vitrify[ray]'")
    # Ray's workers are nice by 15, which starves them on a machine that does anything else.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    options = {"sampler": "random", "trials": 12}
    run(tmp_path / "one", **options)
    run(tmp_path / "ray", ray="local", workers=2, **options)
    assert (tmp_path / "one/trials.csv").read_bytes() == (tmp_path / "ray/trials.csv").read_bytes()
    assert not ray.is_initialized()
    # A cluster that is there already, "auto", is used and left alone.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        run(tmp_path / "auto", ray="auto", **options)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert (tmp_path / "one/trials.csv").read_bytes() == (tmp_path / "auto/trials.csv").read_bytes()


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_said_soon_and_leaves_no_folder(tmp_path):
    pytest.importorskip("ray", reason="needs ray: pip install 'vitrify[ray]'")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"there is no Ray cluster at '127\.0\.0\.1:1'"):
        run(tmp_path / "none", ray="127.0.0.1:1")
    assert time.monotonic() - start < 120
    assert not (tmp_path / "none").exists()
