"""Plans: reading them, their stages' settings, and a run in two stages that is stopped and goes on."""

import json

import pytest
from tiny_training import Blobs, assert_same_bits, quick, tiny_vit, train, weights

from vitrify import Recipe, recipes
from vitrify.errors import InputError
from vitrify.nn import Hamming, Mixture, ShiftLinear
from vitrify.train import Plan, finetune, get_plan, make_task, plan, run_plan
from vitrify.train.plan import Stage, in_two_stages

FEW = Recipe("few", attention={"core": "hamming", "form": "taylor"}, projections="shift", mlp="mixture")


def plan_file(folder, text):
    path = folder / "plan.yaml"
    path.write_text(text)
    return str(path)


def test_a_file(tmp_path):
    text = "stages:\n- {recipe: taylor, epochs: 3}\n- recipe: {attention: taylor, mlp: shift}\n  lr: 1e-5\n"
    read = get_plan(plan_file(tmp_path, text))
    assert [stage.recipe for stage in read.stages] == [recipes.taylor(), Recipe(attention="taylor", mlp="shift")]
    first, second = (stage.config(quick(warmup_epochs=2.5, epochs=9)) for stage in read.stages)
    assert (first.epochs, first.lr, first.warmup_epochs) == (3, 1e-3, 2.5)
    assert (second.epochs, second.lr) == (9, 1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe: taylor\n", ["'stages'"]),
        ("stages: []\n", ["no stage"]),
        ("stages: [taylor]\n", ["stage 1", "recipe"]),
        ("stages:\n- {recipe: taylor}\n- {recipe: tailor}\n", ["stage 2", "did you mean 'taylor'"]),
        ("stages:\n- {recipe: taylor, epoch: 3}\n", ["stage 1", "did you mean 'epochs'"]),
        ("stages:\n- {recipe: taylor, epochs: 0}\n", ["stage 1", "epochs", "0"]),
        ("stages:\n- {recipe: taylor, lr: fast}\n", ["stage 1", "lr", "'fast'"]),
    ],
)
def test_errors_name_the_file_and_the_stage(tmp_path, text, words):
    path = plan_file(tmp_path, text)
    with pytest.raises(InputError) as error:
        get_plan(path)
    for word in [*words, "plan.yaml"]:
        assert word in str(error.value)


def test_names():
    with pytest.raises(InputError, match="did you mean 'shiftaddvit'"):
        get_plan("shiftadvit")
    with pytest.raises(InputError, match="does not exist"):
        get_plan("missing/plan.yaml")
    attention, everything = get_plan("shiftaddvit").stages
    assert everything.recipe == recipes.shiftaddvit()
    assert attention.recipe.attention == everything.recipe.attention
    assert attention.recipe.mlp.primitive == "multiply"


def test_two_stages_stopped_in_the_second_end_as_if_never_stopped(tmp_path, monkeypatch):
    def run(folder):
        model = tiny_vit()
        config = quick(epochs=1)
        task = make_task(config, Blobs(32), Blobs(16))
        return model, run_plan(model, in_two_stages(FEW), task, config, folder)

    model, whole = run(tmp_path / "whole")
    assert {type(m) for m in model.modules()} >= {Hamming, ShiftLinear}
    assert any(isinstance(m, Mixture) for m in model.modules())
    assert (tmp_path / "whole" / "stages" / "1" / "model").is_dir()

    def stop(model, *arguments, **options):
        if model._vitrify.recipe == FEW:
            raise KeyboardInterrupt
        return finetune(model, *arguments, **options)

    monkeypatch.setattr(plan, "finetune", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    monkeypatch.setattr(plan, "finetune", finetune)
    _, resumed = run(tmp_path / "stopped")
    assert_same_bits(weights(whole), weights(resumed))


def test_shares_and_balance_are_logged(tmp_path):
    train(tiny_vit(FEW), quick(epochs=1), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epoch = next(line for line in lines if line["kind"] == "epoch")
    shares = [epoch[f"share/blocks.0.mlp.{expert}"] for expert in ("multiply", "shift")]
    assert sum(shares) == pytest.approx(1)
    assert epoch["aux/blocks.1.mlp.load"] >= 0


def test_a_stage_needs_a_recipe():
    with pytest.raises(InputError, match=r"stage\.recipe"):
        Plan((Stage(3),))
