"""`vitrify explain` and `vitrify probe`, in this process: what they print and write, and how they exit."""

import json

import pytest
import torch
import yaml
from PIL import Image

import vitrify
from vitrify.cli import main
from vitrify.cli.explain import _short
from vitrify.convert import Recipe
from vitrify.cost.target_file import load

torch.set_num_threads(1)


def test_a_table_a_verdict_and_a_recipe(tmp_path, capsys):
    recipe, data = tmp_path / "recipe.yaml", tmp_path / "advice.json"
    arguments = ["explain", "test_vit", "--img-size", "1024", "--output", str(recipe), "--json", str(data)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("attention core", "projections", "taylor", "fp8", "risk (cosine)", "Convert: Taylor attention"):
        assert text in out
    assert Recipe.from_yaml(recipe).attention.core == "taylor"
    found = json.loads(data.read_text())
    assert found["name"] == "test_vit"
    assert found["advice"]["saving"] > found["target"]["saving_error"]["value"]
    model = vitrify.create_model("test_vit", img_size=1024)
    assert vitrify.convert_(model, Recipe.from_yaml(recipe)).changed


def test_do_not_convert_writes_no_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    assert main(["explain", "test_vit", "--target", "h100", "--output", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "Do not convert" in out
    assert "not written" in out
    assert not recipe.exists()


def test_the_recipe_is_printed_ready_to_use(tmp_path, capsys):
    assert main(["explain", "test_vit", "--img-size", "1024"]) == 0
    text = capsys.readouterr().out.partition("# vitrify convert")[2].partition("\n")[2]
    assert text == "name: advised\nattention: taylor\n"
    file, output = tmp_path / "recipe.yaml", tmp_path / "model"
    file.write_text(text)
    assert main(["convert", "vit_mini_patch2_28", "--recipe", str(file), "--output", str(output)]) == 0
    assert "4 changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "taylor", "mlp": "shift"},
        {"mlp": {"primitive": "shift", "activations": "int8"}, "attention": {"core": "hamming", "bias": "drop"}},
    ],
)
def test_a_recipe_in_short_is_the_same_recipe(fields):
    recipe = Recipe("advised", **fields)
    short = _short(recipe)
    assert short == {"name": "advised", **fields}
    assert Recipe.from_dict(short) == recipe


def test_risk_on_images(tmp_path, capsys):
    for index in range(3):
        Image.new("L", (28, 28), 80 * index).save(tmp_path / f"{index}.png")
    arguments = ["explain", "vit_mini_patch2_28", "--target", "cpu", "--images", str(tmp_path)]
    assert main(arguments) == 2
    assert "add --pretrained or --checkpoint" in capsys.readouterr().err
    assert main([*arguments, "--pretrained", "--limit", "2"]) == 0
    assert "shift 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "h101"], "unknown target 'h101': did you mean 'h100'"),
        (["--img-size", "225"], "225 is not a multiple of the model's patch side 16"),
        (["--dtype", "fp4"], "unknown dtype 'fp4'"),
        (["--fusion", "jit"], "unknown fusion 'jit'"),
        (["--img-size", "0"], "must be at least 1, not 0"),
        (["--batch-size", "0"], "must be at least 1, not 0"),
        (["--measured", "nowhere/at/all"], "--measured nowhere/at/all: there is no such folder"),
        (["--target", "nowhere.yaml"], "target 'nowhere.yaml' does not exist"),
        (["--images", "nowhere"], "there is no folder of that name here"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["explain", "test_vit", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ({"lazy": {"value": 1, "unit": "us"}}, "unknown key in launch 'lazy'"),
        ({"eager": {"value": 1, "source": "lab", "status": "measured"}}, "launch.eager has no unit"),
        ({"eager": {"value": -1, "unit": "us", "source": "lab", "status": "measured"}}, "must not be negative, not -1"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "profile"])
def test_a_faulty_target_file(command, launch, message, tmp_path, capsys):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"extends": "h100", "sources": {"lab": "ours"}, "launch": launch}))
    assert main([command, "test_vit", "--target", str(file)]) == 2
    err = capsys.readouterr().err
    assert str(file) in err
    assert message in err


def test_a_size_that_the_model_refuses(capsys):
    assert main(["explain", "levit_128s", "--img-size", "100"]) == 2
    err = capsys.readouterr().err
    assert "refuses inputs of shape (1, 3, 100, 100), at stages.0.blocks.0.attn" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", ["--output", "--json"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vitrify.cost.explain.explain", lambda *_, **__: pytest.fail("worked first"))
    assert main(["explain", "deit_tiny_patch16_224", option, str(tmp_path)]) == 2
    assert f"{option} {tmp_path}: this is a folder" in capsys.readouterr().err


def test_images_from_an_empty_folder_are_refused_before_weights_are_fetched(tmp_path, capsys):
    assert main(["explain", "deit_tiny_patch16_224", "--pretrained", "--images", str(tmp_path)]) == 2
    assert f"no images in {tmp_path}" in capsys.readouterr().err


def test_a_probe_is_a_target(tmp_path, capsys):
    file = tmp_path / "here.yaml"
    assert main(["probe", "--device", "cpu", "--output", str(file)]) == 0
    assert f"written: {file}" in capsys.readouterr().out
    here = load(file)
    assert here.si("peak.fp32") > 1e9
    assert 1e8 < here.si("bandwidth.memory") < 1e13
    assert 1e-8 < here.si("launch.eager") < 1e-3
    assert here.si("units.threads") == torch.get_num_threads()
    assert here["peak.fp32"].status == "measured"
    assert here["efficiency.matmul"] == load("cpu")["efficiency.matmul"]
    assert main(["explain", "test_vit", "--target", str(file)]) == 0


def test_a_probe_is_written_as_yaml_alone(tmp_path, capsys):
    assert main(["probe", "--output", str(tmp_path / "here.txt")]) == 2
    assert "a target file ends in .yaml or .yml" in capsys.readouterr().err
