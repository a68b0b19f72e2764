import json

import pytest

from vitrify.cli import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--tokens", "197,many"], "--tokens: 'many' is not a whole number"),
        (["attention", "--tokens", "0"], "tokens must be at least 1, not 0"),
        (["attention", "--dtype", "int8"], "not 'int8'"),
        (["shift", "--shapes", "197x768"], "--shapes: each shape has 3 sizes with x between, not 197x768"),
        (["shift", "--shapes", "1x2xmany"], "--shapes: 'many' is not a whole number"),
        (["shift", "--shapes", "0x768x768"], "rows must be at least 1, not 0"),
        (["hamming", "--shapes", "1x2x3"], "--shapes: each shape has 5 sizes"),
        (["hamming", "--dtype", "int4"], "not 'int4'"),
        (["mixture", "--shapes", "197x768x3072"], "each shape is ROWSxINxOUT:SHARE, such as 197x768x3072:0.4"),
        (["mixture", "--shapes", "197x768x3072:2"], "multiply is a share of the tokens, from 0 to 1, not 2"),
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


def test_backward_is_measured_and_part_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("vitrify.bench.memory.resident_peak_of", lambda module, request: 1.0)
    arguments = ["--tokens", "64", "--heads", "2", "--head-dim", "32", "--backward", "--device", "cpu"]
    assert main(["bench", "attention", *arguments, "--seconds", "0", "--output", str(tmp_path)]) == 0
    content = json.loads(next(tmp_path.iterdir()).read_text())
    assert "--batch-size 1 --backward --device cpu" in content["command"]
    assert all("gradient" in row["check"]["against"] and row["floor_ms"] > 0 for row in content["rows"])


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


@pytest.mark.parametrize(
    ("benchmark", "shapes", "contender", "cases"),
    [
        ("shift", "3x16x8,1x8x16", "shift int8", [{"rows": 3, "inputs": 16, "outputs": 8}, {"rows": 1}]),
        ("hamming", "1x2x9x4x3", "hamming bits", [{"batch_size": 1, "heads": 2, "tokens": 9, "code_dim": 3}]),
        ("mixture", "9x16x8:0.4,9x16x8:1", "mixture", [{"rows": 9, "multiply": 0.4}, {"multiply": 1.0}]),
    ],
)
def test_operators_are_measured_and_the_command_repeats_them(
    benchmark, shapes, contender, cases, tmp_path, monkeypatch
):
    monkeypatch.setattr("vitrify.bench.memory.resident_peak_of", lambda module, request: 1.0)
    arguments = ["--shapes", shapes, "--device", "cpu", "--seconds", "0", "--output", str(tmp_path)]
    assert main(["bench", benchmark, *arguments]) == 0
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    rows = [row for row in content["rows"] if row["contender"] == contender]
    assert all(row["timing"] and row["floor_ms"] > 0 for row in rows)
    for row, case in zip(rows, cases, strict=True):
        assert row["case"].items() >= case.items()
    assert content["command"] == (
        f"vitrify bench {benchmark} --shapes {shapes} --dtype float32 --device cpu --seconds 0 --seed 0"
    )
    absent = {row["contender"]: row for row in content["rows"] if row["not_run"]}
    assert ("torch FP8" in absent) == (benchmark == "shift")
    assert all(row["timing"] is row["floor_ms"] is None for row in absent.values())


@pytest.mark.parametrize(("benchmark", "count"), [("shift", 9), ("hamming", 3), ("mixture", 8)])
def test_the_default_on_a_cpu_is_a_short_list(benchmark, count, monkeypatch):
    chosen = []
    monkeypatch.setattr("vitrify.cli.bench._run", lambda name, cases, **_: chosen.extend(cases))
    assert main(["bench", benchmark, "--device", "cpu"]) == 0
    assert len(chosen) == count
