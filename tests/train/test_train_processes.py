"""Two processes train what one would: the batch size is global."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import Blobs, quick, tiny_vit, weights

from vitrify.convert import AttentionSpec, Recipe, convert_
from vitrify.train import finetune, make_task, read_metrics

HERE = Path(__file__).resolve().parent
SETTINGS = {"epochs": 2, "lr": 1e-2, "objective": "features", "ema_decay": 0.5, "log_every": 1}


def run(folder):
    """Without dropout, which differs from process to process; a teacher and a head that gets no gradient."""
    teacher = tiny_vit(proj_drop_rate=0, drop_path_rate=0)
    model = tiny_vit(proj_drop_rate=0, drop_path_rate=0)
    convert_(model, Recipe(attention=AttentionSpec("taylor_sparse", threshold=0.06), keep_if_costlier=False))
    config = quick(**SETTINGS, clip_grad=0)
    finetune(model, make_task(config, Blobs(32), Blobs(15)), config, folder, teacher=teacher)


@pytest.mark.slow
def test_two_processes_through_accelerate_launch(tmp_path):
    run(tmp_path / "one")
    source = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_train_processes as t; t.run(sys.argv[1])"
    script = tmp_path / "launched.py"
    script.write_text(source)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--multi_gpu"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    options = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, *options, str(script), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([*read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert [(line["kind"], line["step"]) for line in one] == [(line["kind"], line["step"]) for line in two]
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)  # the variance in the loss is each process's own
    # Evaluation images are shared out, none twice: 15 over two processes.
    assert one[-1]["eval"]["token_cosine"] == pytest.approx(two[-1]["eval"]["token_cosine"], abs=0.02)
    for name, value in weights(tmp_path / "one" / "model").items():
        torch.testing.assert_close(weights(tmp_path / "two" / "model")[name], value, rtol=0.2, atol=0.02)
