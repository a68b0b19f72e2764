"""`vitrify explain` and `vitrify probe`, in this process: what they print and write, and how they exit."""

import json

import pytest
import torch
import yaml
from PIL import Image

import vitrify
from vitrify.cli import main
from vitrify.convert import Recipe
from vitrify.cost.target_file import load

torch.set_num_threads(1)


def test_a_table_a_verdict_and_a_recipe(tmp_path, capsys):
    recipe, data = tmp_path / "recipe.yaml", tmp_path / "advice.json"
    arguments = ["explain", "deit_tiny_patch16_224", "--img-size", "768", "--output", str(recipe), "--json", str(data)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("attention core", "projections", "taylor", "fp8", "risk (cosine)", "Convert: Taylor attention"):
        assert text in out
    assert Recipe.from_yaml(recipe).attention.core == "taylor"
    found = json.loads(data.read_text())
    assert found["name"] == "deit_tiny_patch16_224"
    assert found["advice"]["saving"] > found["target"]["saving_error"]["value"]
    model = vitrify.create_model("deit_tiny_patch16_224", img_size=768)
    assert len(vitrify.convert_(model, Recipe.from_yaml(recipe)).changed) == 12


def test_do_not_convert_writes_no_recipe(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    assert main(["explain", "deit_tiny_patch16_224", "--target", "h100", "--output", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert "Do not convert" in out
    assert "not written" in out
    assert not recipe.exists()


def test_the_recipe_is_printed_ready_to_use(capsys):
    assert main(["explain", "deit_tiny_patch16_224", "--img-size", "768"]) == 0
    text = capsys.readouterr().out.partition("# vitrify convert")[2].partition("\n")[2]
    assert Recipe.from_dict(yaml.safe_load(text)).attention.core == "taylor"


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
        (["--json", "nowhere/at/all.json"], "there is no folder nowhere/at"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(["explain", "deit_tiny_patch16_224", *arguments]) == 2
    assert message in capsys.readouterr().err


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
    assert main(["explain", "deit_tiny_patch16_224", "--target", str(file)]) == 0


def test_a_probe_is_written_as_yaml_alone(tmp_path, capsys):
    assert main(["probe", "--output", str(tmp_path / "here.txt")]) == 2
    assert "a target file ends in .yaml or .yml" in capsys.readouterr().err
