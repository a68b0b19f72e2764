"""A run killed at any moment ends as it would have: real processes, real SIGKILL, the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from tiny_training import Blobs, assert_same_bits, quick, sparse, tiny_vit, train, weights

from vitrify.errors import InputError
from vitrify.train import LabelsTask, finetune, make_task, read_metrics
from vitrify.train.checkpoint import check_keys

# Everything that draws random numbers or keeps state is on. A checkpoint after every step.
SETTINGS = {
    **{"epochs": 4, "mixup": 0.5, "cutmix": 0.5, "ema_decay": 0.9, "threshold_schedule": "rising"},
    **{"amp": "bf16", "checkpoint_every_s": 0},
}


def run(folder, settings):
    torch.set_num_threads(1)
    train(tiny_vit(sparse()), quick(**settings), folder)


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything: they start in a moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitrify.train", "tiny_training"])
    return context


@pytest.fixture(scope="module")
def uninterrupted(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = processes.Process(target=run, args=(folder, SETTINGS))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


def without_times(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in lines]


def start_and_stop(processes, folder, settings, number, delay):
    """Start a run, wait until it has gone on for a step, and `delay` later send the signal; return its exit code."""
    done = set((folder / "checkpoint").glob("step-*"))
    process = processes.Process(target=run, args=(folder, settings))
    process.start()
    while process.is_alive() and set((folder / "checkpoint").glob("step-*")) <= done:
        time.sleep(0.002)
    time.sleep(delay)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    return process.exitcode


def test_killed_again_and_again_it_ends_with_the_same_bits(processes, uninterrupted, tmp_path):
    delays = random.Random()  # not seeded: any moment, also inside the writing of a checkpoint
    killed = 0
    for _ in range(4):
        killed += start_and_stop(processes, tmp_path, SETTINGS, signal.SIGKILL, delays.uniform(0, 0.15)) != 0
    run(tmp_path, SETTINGS)
    assert killed >= 1
    assert_same_bits(weights(tmp_path / "model"), weights(uninterrupted / "model"))
    assert without_times(tmp_path) == without_times(uninterrupted)
    assert not list(tmp_path.rglob(".tmp*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_writes_a_checkpoint_first(processes, uninterrupted, tmp_path, number):
    settings = {**SETTINGS, "checkpoint_every_s": 3600}
    # The first checkpoint is the first epoch's; the signal comes somewhere in the second.
    exit_code = start_and_stop(processes, tmp_path, settings, number, 0)
    assert exit_code != 0
    assert not (tmp_path / "model").exists()
    assert len(list((tmp_path / "checkpoint").glob("step-*"))) == 1
    run(tmp_path, settings)
    assert_same_bits(weights(tmp_path / "model"), weights(uninterrupted / "model"))
    assert without_times(tmp_path) == without_times(uninterrupted)


def stopped_after_an_epoch(folder):
    """Leave a run after one of its four epochs, as if it had been killed there."""

    class Stopping(LabelsTask):
        steps = 0

        def loss(self, model, batch, teacher):
            self.steps += 1
            if self.steps == 6:
                raise ConnectionAbortedError
            return super().loss(model, batch, teacher)

    config = quick(**{**SETTINGS, "checkpoint_every_s": 3600})
    with pytest.raises(ConnectionAbortedError):
        finetune(tiny_vit(sparse()), Stopping(config, Blobs(32), Blobs(16)), config, folder)


def test_resuming_with_other_settings_names_them_and_changes_nothing(tmp_path):
    stopped_after_an_epoch(tmp_path)
    with pytest.raises(InputError, match=r"lr was 0\.001, is now 0\.002. Choose another folder"):
        train(tiny_vit(sparse()), quick(**{**SETTINGS, "lr": 2e-3}), tmp_path)
    with pytest.raises(InputError, match="another recipe"):
        train(tiny_vit(sparse(0.2)), quick(**SETTINGS), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000004"]
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["kind"] == "epoch"


def test_resuming_with_another_start_says_what_differs(tmp_path):
    stopped_after_an_epoch(tmp_path)
    for model, difference in (
        (tiny_vit(sparse(), depth=3), r"model: 'VisionTransformer, [\d,]+ parameters', now 'VisionTransformer, "),
        (tiny_vit(sparse(), seed=1), "initial weights: "),
    ):
        with pytest.raises(InputError, match=f"holds a run with another {difference}"):
            train(model, quick(**SETTINGS), tmp_path)


def test_another_teacher_or_other_data_is_another_run(tmp_path):
    class Named(Blobs):
        source = "holiday"

    class Other(Blobs):
        source = "work"

    config = quick(objective="distill", max_steps=1)
    finetune(tiny_vit(), make_task(config, Named(32)), config, tmp_path, teacher=tiny_vit())
    for data, seed, difference in ((Other(32), 0, "data: 'holiday', now 'work'"), (Named(32), 1, "teacher: ")):
        with pytest.raises(InputError, match=f"holds a run with another {difference}"):
            finetune(tiny_vit(), make_task(config, data), config, tmp_path, teacher=tiny_vit(seed=seed))


def test_a_checkpoint_of_another_model_lists_the_keys():
    mine, other = tiny_vit().state_dict(), tiny_vit(depth=3, embed_dim=24).state_dict()
    with pytest.raises(InputError, match=r"missing keys: blocks\.2\..* and \d+ more.* shape \(1, 1, 16\), the model"):
        check_keys("model", other, mine)


def test_resuming_from_a_truncated_checkpoint(tmp_path):
    stopped_after_an_epoch(tmp_path)
    path = tmp_path / "checkpoint" / "step-00000004" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"step-00000004 is truncated.*resume='never'"):
        train(tiny_vit(sparse()), quick(**SETTINGS), tmp_path)
    train(tiny_vit(sparse()), quick(**{**SETTINGS, "max_steps": 1}), tmp_path, resume="never")
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
