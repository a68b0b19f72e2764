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


def test_latencies_of_another_batch_are_refused(tmp_path, capsys):
    command = ["finetune", *MINI, "--recipe", "vitrify", *QUICK]
    assert run(*command, "--alpha", "measured", "--output", tmp_path / "a") == 0
    command[command.index("--batch-size") + 1] = "2"
    assert run(*command, "--alpha", tmp_path / "a" / "latencies.json", "--output", tmp_path / "b") == 2
    assert "the latencies are of tokens" in capsys.readouterr().err


def test_alpha_without_a_mixture_is_refused(tmp_path, capsys):
    command = ["finetune", *MINI, "--recipe", "taylor", *QUICK, "--output", tmp_path / "a"]
    assert run(*command, "--alpha", "measured") == 2
    assert "no mixture to balance" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_each_stage_keeps_the_latencies_of_its_own_mixtures(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("stages:\n- recipe: {modules: {blocks.0.mlp: mixture}}\n- recipe: {mlp: mixture}\n")
    command = ["finetune", *MINI, "--plan", plan, *QUICK, "--alpha", "measured", "--output", tmp_path / "run"]
    assert run(*command) == 0
    measured = [json.loads((tmp_path / "run" / f / "latencies.json").read_text())["modules"] for f in ("stages/1", "")]
    assert [len(modules) for modules in measured] == [1, 4]


def test_codes_of_an_artefact_are_calibrated_once(tmp_path, capsys, monkeypatch):
    (tmp_path / "ksh.yaml").write_text("attention: {core: hamming, binariser: ksh}\n")
    assert run("convert", *MINI, "--recipe", tmp_path / "ksh.yaml", "--output", tmp_path / "a") == 0
    assert "the codes are not fitted" in capsys.readouterr().err
    assert run("finetune", tmp_path / "a", *QUICK, "--output", tmp_path / "b") == 0
    tuned = load(tmp_path / "b" / "model")
    assert not any(core.needs_calibration() for core in tuned.modules() if isinstance(core, Hamming))
    monkeypatch.setattr(Hamming, "calibrate_", lambda *_, **__: pytest.fail("what was trained was fitted again"))
    assert run("finetune", tmp_path / "b", *QUICK, "--output", tmp_path / "c") == 0


def test_a_packed_artefact_is_not_packed_again(tmp_path, capsys):
    assert run("convert", *MINI, "--recipe", "vitrify", "--output", tmp_path / "a") == 0
    assert run("pack", tmp_path / "a", "--output", tmp_path / "b") == 0
    assert run("pack", tmp_path / "b", "--output", tmp_path / "c") == 2
    assert "packed already" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
