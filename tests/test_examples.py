"""The files of examples/ are what their first lines say they are."""

import runpy
from pathlib import Path

import pytest
import timm

from vitrify import Recipe, convert_
from vitrify.accelerator.explore.space import read as read_space
from vitrify.accelerator.hardware import load as load_hardware
from vitrify.nn import Hamming, Softmax
from vitrify.train import get_plan

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_is_a_recipe_or_a_plan_or_a_space(path):
    if path.name.startswith("plan_"):
        assert get_plan(str(path)).stages
    elif path.name.startswith("explore_"):
        assert read_space(path, load_hardware(path.stem.removeprefix("explore_"))).size > 1
    else:
        assert Recipe.from_yaml(path)


def test_the_plan_for_pvt_removes_the_reduction_first():
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64))
    cores = []
    for stage in get_plan(str(EXAMPLES / "plan_pvt.yaml")).stages:
        convert_(model, stage.recipe)
        cores.append([type(model.get_submodule(f"stages.{i}.blocks.0.attn").core) for i in range(4)])
    assert cores[0] == [Softmax] * 4
    assert cores[1] == cores[2]
    assert cores[2][:3] == [Hamming] * 3
    assert cores[2][3] is not Hamming


def test_a_new_accelerator_takes_a_description_and_a_schedule(capsys):
    path = EXAMPLES / "new_accelerator.py"
    assert len(path.read_text().splitlines()) < 100
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert "two arrays, one of them for K^T V" in printed
    assert "context " in printed
