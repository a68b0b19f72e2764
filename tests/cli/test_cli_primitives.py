"""The command line on recipes that shift, add and mix: calibrate, pack, alpha, plans."""

import json

import pytest
import torch

from vitrify import load
from vitrify.cli import finetune, main, options
from vitrify.nn import Hamming, Mixture

torch.set_num_threads(1)

MINI = ["vit_mini_patch2_28", "--pretrained"]
SHIPPED = "fashion-mnist:shipped"
QUICK = ["--data", SHIPPED, "--max-steps", "1", "--batch-size", "4", "--limit-train", "8", "--warmup-epochs", "0"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    # The command sets it for its own process; here it must not outlive the test.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True)
def few_test_images(monkeypatch):
    monkeypatch.setattr(
        finetune, "_open_evaluation", lambda data, model, *_, **__: options.open_data(data, "test", model, limit=8)
    )


def run(*words):
    return main([str(word) for word in words])


def test_convert_calibrates_and_pack_packs(tmp_path, capsys):
    command = ["convert", *MINI, "--recipe", "shiftaddvit", "--calibrate", SHIPPED]
    assert run(*command, "--output", tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "codes explain" in out
    assert "output error of 16 shift layers" in out
    assert run("pack", tmp_path / "a", "--output", tmp_path / "b") == 0
    out = capsys.readouterr().out
    assert "16 shift layers packed" in out
    image = torch.randn(1, 1, 28, 28)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a")(image), load(tmp_path / "b")(image))


def test_nothing_to_pack_or_to_calibrate(tmp_path, capsys):
    assert run("convert", *MINI, "--recipe", "taylor", "--output", tmp_path / "a") == 0
    assert run("pack", tmp_path / "a", "--output", tmp_path / "b") == 2
    assert "no shift layer" in capsys.readouterr().err
    assert run("pack", tmp_path / "none", "--output", tmp_path / "b") == 2
    command = ["convert", *MINI, "--recipe", "taylor", "--calibrate", SHIPPED, "--output", tmp_path / "b"]
    assert run(*command) == 2
    assert not (tmp_path / "b").exists()


def test_a_plan_in_two_stages(tmp_path, capsys):
    assert run("finetune", *MINI, "--plan", "shiftaddvit", *QUICK, "--output", tmp_path / "run") == 0
    model = load(tmp_path / "run" / "model")
    kinds = {type(module) for module in model.modules()}
    assert Hamming in kinds
    assert any(isinstance(module, Mixture) for module in model.modules())
    assert (tmp_path / "run" / "stages" / "1" / "model").is_dir()
    command = ["finetune", *MINI, "--plan", "shiftaddvit", "--recipe", "taylor", *QUICK, "--output", tmp_path / "x"]
    assert run(*command) == 2
    assert "--recipe or --plan" in capsys.readouterr().err


def test_alpha_measured_is_kept_and_read_back(tmp_path, capsys):
    command = ["finetune", *MINI, "--recipe", "vitrify", *QUICK]
    assert run(*command, "--alpha", "measured", "--output", tmp_path / "a") == 0
    file = tmp_path / "a" / "latencies.json"
    record = json.loads(file.read_text())
    assert all(seconds > 0 for entry in record["modules"].values() for seconds in entry["seconds"].values())
    assert run(*command, "--alpha", file, "--output", tmp_path / "b") == 0
    file.write_text(json.dumps({**record, "device": "another"}))
    assert run(*command, "--alpha", file, "--output", tmp_path / "c") == 2
    assert "measured on another" in capsys.readouterr().err
    assert run(*command, "--alpha", "fast", "--output", tmp_path / "d") == 2
    assert "--alpha must be" in capsys.readouterr().err
