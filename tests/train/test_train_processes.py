"""Two processes train what one would: the batch size is global."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import Blobs, quick, sparse, tiny_vit, weights

from vitrify.artefact import create_model
from vitrify.convert import AttentionSpec, Recipe, convert_
from vitrify.train import finetune, make_task, read_metrics

HERE = Path(__file__).resolve().parent


class Labelled(list):
    """Pairs of image and label as a data set."""

    classes = ("a", "b", "c", "d")
    labelled = True


def run(folder, objective):
    """Without dropout, whose draws differ from process to process; 15 images to evaluate, which two cannot halve."""
    teacher = tiny_vit(proj_drop_rate=0, drop_path_rate=0)
    model = tiny_vit(proj_drop_rate=0, drop_path_rate=0)
    convert_(model, sparse())
    config = quick(objective=objective, lr=3e-3, ema_decay=0.5, log_every=1)
    torch.manual_seed(1)  # Blobs draws its noise anew at each reading; every process must measure the same images
    measured = [Blobs(15)[index] for index in range(15)]
    finetune(model, make_task(config, Blobs(32), measured), config, folder, teacher=teacher)


def launch(folder, call):
    """Run a call of this module in two processes."""
    script = folder / "launched.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        f"from test_train_processes import *; {call}\n"
        "import accelerate; state = accelerate.PartialState()\n"
        # A file each: what two processes print to one pipe may interleave.
        f"open({str(folder / 'process')!r} + str(state.process_index), 'w').write(str(state.num_processes))\n"
    )
    # torchrun, for `accelerate launch --cpu` starts a second process only through MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(folder / f"process{index}").read_text() for index in range(2)] == ["2", "2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "tolerance"),
    # "features" divides by the teacher's variance over each process's own images, and leaves the head without gradient.
    [("labels", 1e-4), ("features", 0.25)],
)
def test_two_processes_share_the_batch(tmp_path, objective, tolerance):
    run(tmp_path / "one", objective)
    launch(tmp_path, f"run({str(tmp_path / 'two')!r}, {objective!r})")
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [(line["kind"], line["step"]) for line in one] == [(line["kind"], line["step"]) for line in two]
    for alone, shared in zip(one, two, strict=True):
        assert shared["loss"] == pytest.approx(alone["loss"], rel=tolerance)
    assert two[-1]["eval"] == pytest.approx(one[-1]["eval"], rel=tolerance)
    alone, shared = (weights(tmp_path / name / "model") for name in ("one", "two"))
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=tolerance * 0.1)


def run_reduced(folder):
    """A PVT whose spatial reduction a recipe took away: its convolution and norm get no gradient."""
    torch.manual_seed(0)
    model = create_model("pvt_mini_56", num_classes=4, img_size=56)
    convert_(model, Recipe("removed", AttentionSpec("softmax", reduction="remove")))
    images = [(torch.randn(1, 56, 56), index % 4) for index in range(4)]
    config = quick(epochs=1, batch_size=2)
    finetune(model, make_task(config, Labelled(images), Labelled(images)), config, folder)


@pytest.mark.slow
def test_two_processes_and_parameters_that_a_recipe_left_idle(tmp_path):
    launch(tmp_path, f"run_reduced({str(tmp_path / 'run')!r})")
    assert (tmp_path / "run" / "model").is_dir()
