"""Bad input: exit code 2 (or 1 where the machine failed), one readable block on stderr, nothing half-written."""

import errno
import os
import sys

import pytest
import torch

import vitrify.artefact.folder
from vitrify import VitrifyError
from vitrify.cli import main, options

torch.set_num_threads(1)

MINI = "vit_mini_patch2_28"


def fails(arguments, capsys, code=2):
    """Run, check the exit code and that it is one block without traceback; return the message."""
    assert main([str(argument) for argument in arguments]) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message
    return message


@pytest.fixture
def output(tmp_path):
    return tmp_path / "artefact"


def test_unknown_model(output, capsys):
    message = fails(["convert", "vit_mini_patch2_82", "-o", output], capsys)
    assert f"did you mean '{MINI}'" in message
    assert not output.exists()


def test_unknown_recipe(output, capsys):
    message = fails(["convert", MINI, "--recipe", "vitalty", "-o", output], capsys)
    assert "did you mean 'vitality'" in message


def test_unknown_key_in_a_recipe_file(output, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("attention:\n  cor: taylor\n")
    message = fails(["convert", MINI, "--recipe", tmp_path / "r.yaml", "-o", output], capsys)
    assert "did you mean 'core'" in message


def test_bad_value_in_a_recipe_file(output, tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("attention:\n  core: taylor_sparse\n  threshold: 3\n")
    message = fails(["convert", MINI, "--recipe", tmp_path / "r.yaml", "-o", output], capsys)
    assert "attention.threshold must be in [0, 1], not 3" in message


def test_missing_recipe_file(output, tmp_path, capsys):
    assert "none.yaml" in fails(["convert", MINI, "--recipe", tmp_path / "none.yaml", "-o", output], capsys)


def test_truncated_checkpoint(output, tmp_path, capsys):
    file = tmp_path / "c.pth"
    torch.save({"w": torch.randn(1000)}, file)
    file.write_bytes(file.read_bytes()[:900])
    assert "not a complete torch checkpoint" in fails(["convert", MINI, "--checkpoint", file, "-o", output], capsys)
    assert not output.exists()


def test_foreign_checkpoint(output, tmp_path, capsys):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "c.pth")
    message = fails(["convert", MINI, "--checkpoint", tmp_path / "c.pth", "-o", output], capsys)
    assert "missing keys" in message
    assert "1 unexpected key: conv.weight" in message


def test_checkpoint_with_code(output, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-run"),)

    torch.save({"x": Evil()}, tmp_path / "c.pth")
    assert "would run code" in fails(["convert", MINI, "--checkpoint", tmp_path / "c.pth", "-o", output], capsys)
    assert not (tmp_path / "was-run").exists()


def test_output_below_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = fails(["convert", MINI, "-o", tmp_path / "file" / "artefact"], capsys, code=1)
    assert "nothing was written" in message


def test_output_is_someone_elses_folder(tmp_path, capsys, monkeypatch):
    """Refused before the model is even built."""
    (tmp_path / "photo.jpg").write_text("")
    monkeypatch.setattr(options, "load_model", lambda *_, **__: pytest.fail("work was done first"))
    assert "not an artefact" in fails(["convert", MINI, "-o", tmp_path], capsys)


def test_full_disk(output, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(vitrify.artefact.folder, "save_file", full)
    message = fails(["convert", MINI, "-o", output], capsys, code=1)
    assert "No space left on device" in message
    assert list(output.parent.iterdir()) == []


def test_a_size_below_one(output, capsys):
    assert main(["convert", "levit_128s", "--img-size", "-3", "-o", str(output)]) == 2
    assert "'--img-size': must be at least 1, not -3" in capsys.readouterr().err


def test_a_size_that_cuts_patches(output, capsys):
    """timm would build it, and leave the last row and column of pixels out."""
    message = fails(["convert", "deit_tiny_patch16_224", "--img-size", "225", "-o", output], capsys)
    assert "--img-size 225 is not a multiple of the model's patch side 16: take 224 or 240" in message
    assert not output.exists()


FINETUNE = ["finetune", MINI, "--data", "fashion-mnist:shipped", "-o", "run"]


@pytest.mark.parametrize(
    ("command", "option", "value", "low"),
    [
        (["convert", MINI, "-o", "artefact"], "--in-chans", "0", 1),
        (FINETUNE, "--num-classes", "-1", 0),
        (["eval", MINI, "--data", "fashion-mnist"], "--limit", "-3", 1),
        (["eval", MINI, "--data", "fashion-mnist"], "--batch-size", "0", 1),
        (["bench", "attention"], "--heads", "0", 1),
        (["bench", "models"], "--seconds", "-0.5", 0),
        (["demo"], "--seconds", "0.5", 1),
    ],
)
def test_numbers_below_what_there_is(command, option, value, low, capsys):
    assert main([*command, option, value]) == 2
    # The message stands in a frame, whose lines it fills.
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert f"Invalid value for '{option}': must be at least {low}, not {value}" in message


def test_without_transformers(output, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = fails(["convert", f"hf:{tmp_path}", "-o", output], capsys)
    assert "a Hugging Face model needs transformers: pip install 'vitrify[hf]'" in message


def test_on_error_is_checked_for_data_without_files_too(capsys):
    message = fails(["eval", MINI, "--data", "fashion-mnist:shipped", "--on-error", "skp", "--limit", "2"], capsys)
    assert "unknown on_error 'skp': did you mean 'skip'" in message


def test_a_path_that_is_no_model(tmp_path, capsys):
    assert "no artefact at" in fails(["eval", tmp_path / "none", "--data", "fashion-mnist"], capsys)
    assert "is not an artefact" in fails(["eval", tmp_path, "--data", "fashion-mnist"], capsys)


def test_options_that_contradict_an_artefact(output, capsys):
    assert main(["convert", MINI, "-o", str(output)]) == 0
    capsys.readouterr()
    message = fails(["eval", output, "--data", "fashion-mnist:shipped", "--img-size", "32"], capsys)
    assert "settles --img-size itself" in message


def test_unknown_data(capsys):
    message = fails(["eval", MINI, "--data", "fashion-mnits"], capsys)
    assert "did you mean 'fashion-mnist'" in message


def test_unknown_origin_of_the_original(capsys):
    message = fails(["eval", MINI, "--data", "fashion-mnist:shipped", "--against", "original"], capsys)
    assert "not known where the original weights came from" in message


def test_wrong_number_of_classes(capsys):
    message = fails(["eval", MINI, "--num-classes", "3", "--data", "fashion-mnist:shipped", "--limit", "2"], capsys)
    assert "3 classes" in message
    assert "10" in message


def test_bad_training_setting(tmp_path, capsys):
    given = ["finetune", MINI, "--data", "fashion-mnist:shipped", "-o", tmp_path / "run"]
    assert "lr must be above 0, not -1.0" in fails([*given, "--lr", "-1"], capsys)
    assert not (tmp_path / "run").exists()


def test_device_that_is_not_here(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use auto or cpu" in fails(["eval", MINI, "--data", "fashion-mnist", "--device", "cuda"], capsys)
    assert "must be auto, cpu, cuda" in fails(["eval", MINI, "--data", "fashion-mnist", "--device", "gpu"], capsys)


def test_json_into_a_folder_that_is_not_there(tmp_path, capsys):
    """Found out before the hours of work, not after."""
    given = ["eval", MINI, "--data", "fashion-mnist:shipped", "--json", tmp_path / "none" / "r.json"]
    assert "there is no folder" in fails(given, capsys)


@pytest.mark.parametrize("arguments", [["convert"], ["nonsense"], ["finetune", MINI, "--objective", "lables"]])
def test_usage(arguments, capsys):
    assert main(arguments) == 2
    assert "Usage" in capsys.readouterr().err


def test_an_unexpected_error_is_one_block_unless_asked(capsys, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(options, "load_model", broken)
    given = ["eval", MINI, "--data", "fashion-mnist"]
    assert "ZeroDivisionError: division by zero" in fails(given, capsys, code=1)
    monkeypatch.setenv("VITRIFY_DEBUG", "1")
    assert main(given) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_fails_without_being_the_users_fault_is_1(capsys, monkeypatch):
    def offline(*_, **__):
        raise VitrifyError("no [network] here")

    monkeypatch.setattr(options, "load_model", offline)
    # Square brackets are text, not colours.
    assert "no [network] here" in fails(["eval", MINI, "--data", "fashion-mnist"], capsys, code=1)
