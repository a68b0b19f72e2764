"""`vitrify profile`: on every kind of model, beside the conversion, as a table, as CSV and as JSON; and bad input."""

from __future__ import annotations

import csv
import json

import pytest

import vitrify
from vitrify.cli import main

MINI = "vit_mini_patch2_28"


def test_a_model_in_a_table(capsys):
    assert main(["profile", MINI, "--target", "a100", "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "input 2 x 1 x 28 x 28" in shown
    assert "latency: a100" in shown
    assert "blocks.*.attn core" in shown
    assert "converted" not in shown
    assert "269,098" in shown.splitlines()[-1]  # parameters, in the line of totals


def test_original_beside_converted_everywhere(tmp_path, capsys):
    table, data = tmp_path / "new" / "costs.csv", tmp_path / "costs.json"
    assert main(["profile", MINI, "--recipe", "shiftaddvit", "--csv", str(table), "--json", str(data)]) == 0
    captured = capsys.readouterr()
    assert "converted / original: multiplications 0." in captured.out
    assert "recipe shiftaddvit: 16 changed, 0 kept, 0 refused" in captured.err
    with table.open() as file:
        rows = list(csv.DictReader(file))
    totals = {row["model"]: row for row in rows if row["group"] == "total"}
    assert set(totals) == {"original", "converted"}
    written = json.loads(data.read_text())
    assert written["recipe"]["name"] == "shiftaddvit"
    assert written["input_shape"] == [1, 1, 28, 28]
    assert written["energy"] == {"target": "eyeriss", "preset": "like_for_like"}
    for which, total in totals.items():
        for field in ("parameters", "multiplications", "additions", "shifts", "others"):
            assert int(total[field]) == written[which]["total"][field]
            assert sum(int(row[field]) for row in rows if row["model"] == which) == 2 * int(total[field])
        assert float(total["latency_s"]) == written[which]["total"]["latency_s"] > 0
    assert int(totals["original"]["shifts"]) == 0 < int(totals["converted"]["shifts"])
    groups = [row["group"] for row in rows if row["model"] == "converted"]
    assert groups == [*written["converted"]["groups"], "total"]


def test_another_size_and_a_pyramid(tmp_path):
    data = tmp_path / "costs.json"
    assert main(["profile", "test_vit", "--img-size", "96", "--json", str(data)]) == 0
    assert json.loads(data.read_text())["input_shape"] == [1, 3, 96, 96]


def test_an_artefact_and_its_codes(tmp_path, capsys):
    model = vitrify.create_model(MINI)
    vitrify.convert_(model, vitrify.Recipe("shift", mlp="shift"))
    vitrify.pack_(model)
    vitrify.save(model, tmp_path / "packed")
    assert main(["profile", str(tmp_path / "packed")]) == 0
    assert "269,098" in capsys.readouterr().out.splitlines()[-1]


def test_a_hugging_face_folder(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTConfig(image_size=32, patch_size=8, architectures=["ViTModel"], **sizes).save_pretrained(tmp_path)
    assert main(["profile", f"hf:{tmp_path}", "--recipe", "taylor"]) == 0
    assert "core" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_mini_patch2_82"], f"did you mean '{MINI}'"),
        ([MINI, "--recipe", "shiftadvit"], "did you mean 'shiftaddvit'"),
        ([MINI, "--img-size", "27"], "27"),
        ([MINI, "--batch-size", "0"], "at least 1, not 0"),
        ([MINI, "--target", "h1000"], "did you mean 'h100'"),
        (["no/such/folder"], "there is no artefact at no/such/folder"),
    ],
)
def test_bad_input_exits_with_2_and_says_what_would_be_right(arguments, message, capsys):
    assert main(["profile", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--csv", "--json"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitrify.cost.profile.profile", lambda *_, **__: pytest.fail("worked first"))
    (tmp_path / "file").write_text("")
    assert main(["profile", MINI, option, str(tmp_path / "file" / "costs")]) == 2
    assert f"{option} {tmp_path / 'file' / 'costs'}: cannot be written" in capsys.readouterr().err
    assert main(["profile", MINI, option, str(tmp_path)]) == 2
    assert f"{option} {tmp_path}: this is a folder" in capsys.readouterr().err
