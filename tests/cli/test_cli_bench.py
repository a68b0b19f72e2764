import json

import pytest

from vitrify.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--tokens", "197,many"], "--tokens: 'many' is not a whole number"),
        (["attention", "--tokens", "0"], "tokens must be at least 1, not 0"),
        (["attention", "--dtype", "int8"], "not 'int8'"),
        (["models", "--models", "deit_tiny_patch16_224"], "each entry is NAME:SIZE"),
        (["models", "--models", "deit_tiny_patch16_225:224"], "deit_tiny_patch16_224"),
        (["models", "--models", "test_vit:160", "--recipe", "tailor"], "taylor"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_would_be_right(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_attention_is_measured_shown_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("vitrify.bench.memory.resident_peak_of", lambda module, request: 1.0)
    arguments = [
        "--tokens",
        "64,128",
        "--heads",
        "2",
        "--head-dim",
        "32",
        "--device",
        "cpu",
        "--seconds",
        "0",
        "--seed",
        "7",
    ]
    assert main(["bench", "attention", *arguments, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Taylor packed" in shown
    assert "floor ms" in shown
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert [row["case"]["tokens"] for row in content["rows"]] == [64] * 4 + [128] * 4
    assert content["command"] == (
        "vitrify bench attention --tokens 64,128 --heads 2 --head-dim 32 --dtype float32 --batch-size 1 --device cpu "
        "--seconds 0 --seed 7"
    )


def test_an_output_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("vitrify.bench.run", lambda *_, **__: pytest.fail("measured first"))
    assert main(["bench", "attention", "--output", str(tmp_path / "file" / "results")]) == 2
    assert f"--output {tmp_path / 'file' / 'results'}: cannot write" in capsys.readouterr().err


def test_a_refused_contender_makes_the_command_fail(capsys, monkeypatch):
    monkeypatch.setattr("vitrify.bench.memory.resident_peak_of", lambda module, request: 1.0)
    monkeypatch.setattr("vitrify.bench.attention.taylor_attention", lambda query, key, value: value)
    arguments = ["--tokens", "64", "--heads", "2", "--device", "cpu", "--seconds", "0"]
    assert main(["bench", "attention", *arguments]) == 1
    assert "wrong output, or none, from: Taylor, Taylor packed" in capsys.readouterr().err
