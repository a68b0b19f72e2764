"""The advisor: shares and savings against whole models converted and timed, the advice, its limits, bad input."""

import json

import pytest
import timm
import torch
from torch import nn

import vitrify
from vitrify import InputError, Recipe, UnsupportedError
from vitrify.cost.explain.groups import Layout
from vitrify.cost.latency import latency
from vitrify.cost.target_file import load
from vitrify.models import fashion_vit  # noqa: F401  # registers vit_mini_patch2_28

torch.set_num_threads(1)


def build(name="deit_tiny_patch16_224", **kwargs):
    """A model without weights; half a DeiT-Tiny by default."""
    sizes = {"depth": 6} if name.startswith("deit") else {}
    with torch.device("meta"):
        return timm.create_model(name, **sizes, **kwargs).eval()


@pytest.fixture(scope="module")
def large():
    """DeiT-Tiny on images on which attention is most of the work."""
    return vitrify.explain(build(img_size=768), (3, 768, 768), target="h100")


def row(found, group):
    return next(row for row in found.rows if row.group == group)


def seconds(recipe, size, **kwargs):
    model = build(img_size=size)
    if recipe is not None:
        vitrify.convert_(model, recipe, input_size=(3, size, size))
    return latency(vitrify.workload(model, (3, size, size)), "h100", **kwargs).seconds


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "pvt_v2_b0", "levit_128s", "mobilevit_xxs"])
def test_every_operation_has_a_group(name):
    model = build(name)
    graph = vitrify.workload(model)
    groups = Layout.of(model).groups(graph)
    by_id = {op.id: op for op in graph.operations}
    assert set(groups) == set(by_id)
    core = {key for key, group in groups.items() if group == "attention core"}
    assert {key for key, op in by_id.items() if op.step} <= core
    products = {
        group: [by_id[key] for key, own in groups.items() if own == group and by_id[key].macs]
        for group in groups.values()
    }
    assert all(op.inputs[1].kind == "weight" for group in ("projections", "MLP") for op in products[group])
    assert products["patch embedding"][0].kind == "conv"
    assert products["head"][-1].n == 1000


def test_groups_of_a_vit_by_name():
    model = build()
    graph = vitrify.workload(model)
    groups = Layout.of(model).groups(graph)
    found = {(op.module, op.kind == "vector"): groups[op.id] for op in graph.operations}
    assert found["patch_embed.proj", False] == "patch embedding"
    assert found["blocks.0.norm1", True] == found["blocks.5", True] == "norms, residuals"
    assert found["blocks.5.attn.qkv", False] == found["blocks.5.attn.proj", True] == "projections"
    assert found["blocks.5.mlp.act", True] == "MLP"
    assert found["norm", True] == found["head", False] == "head"


def test_shares_are_of_the_whole(large):
    assert sum(row.time_share for row in large.rows) == pytest.approx(1)
    assert sum(row.energy_share for row in large.rows) == pytest.approx(1)
    assert large.seconds == pytest.approx(seconds(None, 768), rel=0.02)
    bf16 = vitrify.workload(build(img_size=768).bfloat16(), (3, 768, 768))
    assert large.energy_pj == pytest.approx(vitrify.energy(bf16).total_pj, rel=1e-4)


@pytest.mark.parametrize(
    ("group", "primitive", "recipe"),
    [
        ("attention core", "taylor", Recipe("t", attention="taylor")),
        ("attention core", "hamming", Recipe("h", attention="hamming")),
        ("MLP", "shift", Recipe("s", mlp="shift")),
        ("projections", "shift", Recipe("p", projections="shift")),
        ("MLP", "mixture", Recipe("m", mlp="mixture")),
    ],
)
def test_savings_are_those_of_the_whole_model_converted(large, group, primitive, recipe):
    whole = 1 - seconds(recipe, 768) / seconds(None, 768)
    assert row(large, group).savings[primitive].time == pytest.approx(whole, abs=0.01)


def test_fp8_takes_half_of_what_the_products_of_int8_layers_take_in_bf16(large):
    for group in ("projections", "MLP"):
        savings = row(large, group).savings
        assert savings["fp8"].time == pytest.approx(savings["int8"].time)  # the H100's peaks are equal
        assert savings["fp8"].energy is None
        assert savings["int8"].energy > 0
    tx2 = vitrify.explain(build(), target="jetson_tx2")
    assert not {"int8", "fp8", "shift8"} & {p for row in tx2.rows for p in row.savings}


def test_it_advises_what_saves_more_than_its_error(large):
    assert large.advice.recipe.attention.core == "taylor"
    assert large.advice.saving > large.error.value
    assert "Convert: Taylor attention" in large.verdict
    assert large.verdict.startswith("At 768 px the attention core is ")
    after = seconds(large.advice.recipe, 768)
    assert 1 - after / seconds(None, 768) == pytest.approx(large.advice.saving, abs=0.01)


@pytest.mark.parametrize("target", ["h100", "cpu"])
def test_do_not_convert(target):
    found = vitrify.explain(build(), target=target)
    saved = [
        row.savings[p].time for row in found.rows for p in ("taylor", "hamming", "shift", "mixture") if p in row.savings
    ]
    if max(saved) <= found.error.value:
        assert found.advice.recipe is None
        assert "Do not convert" in found.verdict
    else:  # a calibration of the target may say otherwise, and then it must say so
        assert found.advice.recipe is not None
        assert "Convert: " in found.verdict


@pytest.mark.slow
def test_the_break_even_is_where_taylor_begins_to_save(large):
    side = large.sizes.break_even
    assert side % 16 == 0
    at = {size: vitrify.explain(build(img_size=size), (3, size, size)) for size in (side - 16, side)}
    assert row(at[side], "attention core").savings["taylor"].time > 0
    below = row(at[side - 16], "attention core").savings.get("taylor")
    assert below is None or below.time <= 0
    assert at[side].sizes.break_even == side
    savings = list(large.sizes.savings.values())
    assert savings[-1] == max(savings)


@pytest.mark.slow
def test_a_model_of_one_size_has_no_break_even():
    assert vitrify.explain(build("levit_128s"), target="a100").sizes is None


@pytest.mark.slow
def test_a_stopwatch_overrules_the_model(tmp_path):
    machine = load("cpu").machine
    case = {"model": "deit_tiny_patch16_224", "image_size": 224, "batch_size": 1}
    timing = {"timing": {"median_ms": 30.0}}

    def advice(verdict, taylor_ms, threads=1):
        rows = [
            {"case": case, "contender": "original", "speedup": None, **timing},
            {"case": case, "contender": "taylor", "speedup": {"verdict": verdict}, "timing": {"median_ms": taylor_ms}},
        ]
        (tmp_path / f"models-{machine}.json").write_text(json.dumps({"machine": {"threads": threads}, "rows": rows}))
        return vitrify.explain(build(), target="cpu", measured=tmp_path)

    slower = advice("slower", 33.0)
    assert slower.advice.measured_s == pytest.approx(0.03)
    assert slower.advice.recipe is None
    assert "Do not convert: Taylor attention costs 10 % (measured on this machine)" in slower.verdict
    faster = advice("faster", 20.0)
    assert faster.advice.recipe.attention.core == "taylor"
    assert "saves 33 % of the time (measured on this machine)" in faster.verdict
    assert advice("faster", 20.0, threads=2).advice.measured_s is None


def test_the_risk_is_measured_on_images():
    model = vitrify.create_model("vit_mini_patch2_28", pretrained=True).eval()
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    steps = []
    found = vitrify.explain(model, target="cpu", images=images, progress=steps.append)
    risk = {(row.group, p): cosine for row in found.rows for p, cosine in row.risk.items()}
    recipe = Recipe("p", projections="shift")
    converted = vitrify.create_model("vit_mini_patch2_28", pretrained=True).eval()
    vitrify.convert_(converted, recipe)
    with torch.no_grad():
        cosine = nn.functional.cosine_similarity(model(images).double(), converted(images).double()).mean().item()
    assert risk["projections", "shift"] == pytest.approx(cosine, abs=1e-6)
    assert risk["MLP", "int8"] > 0.99
    assert risk["attention core", "taylor"] < risk["MLP", "int8"]
    assert any("risk of taylor in attention core, 3 images" in step for step in steps)
    assert getattr(model, "_vitrify", None) is None  # the user's model is as it was
    with pytest.raises(InputError, match=r"images must be \(images, 1, 28, 28\), not \(3, 1, 32, 32\)"):
        vitrify.explain(model, target="cpu", images=torch.zeros(3, 1, 32, 32))


def test_the_risk_needs_weights():
    with pytest.raises(InputError, match="this model has none: it is on the meta device"):
        vitrify.explain(build(), target="cpu", images=torch.zeros(1, 3, 224, 224))


def test_a_converted_model_is_explained_as_it_is():
    model = build(img_size=768)
    vitrify.convert_(model, vitrify.recipes.taylor(), input_size=(3, 768, 768))
    found = vitrify.explain(model, (3, 768, 768))
    assert found.seconds == pytest.approx(seconds(vitrify.recipes.taylor(), 768), rel=0.02)
    assert row(found, "attention core").savings["taylor"].time == pytest.approx(0, abs=1e-9)


def test_a_model_without_attention():
    found = vitrify.explain(build("resnet18"), (3, 64, 64), target="a100")
    assert found.advice.recipe is None
    assert found.sizes is None
    assert "This model has no attention. Do not convert" in found.verdict
    assert [row.group for row in found.rows] == ["convolutions", "norms, residuals", "head"]


def test_json(large):
    data = json.loads(json.dumps(large.to_dict()))
    assert data["target"]["name"] == "h100"
    assert data["verdict"] == large.verdict
    assert Recipe.from_dict(data["advice"]["recipe"]) == large.advice.recipe
    assert data["rows"][1]["savings"]["taylor"].keys() == {"time", "energy"}


class Undecided(nn.Module):
    """Decides by the values of its tensors, which a trace has none of."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_bad_input():
    model = build()
    model.blocks[5].mlp.act = Undecided()
    with pytest.raises(UnsupportedError, match=r"blocks\.5\.mlp\.act \(Undecided\)"):
        vitrify.explain(model)
    with pytest.raises(InputError, match=r"VisionTransformer refuses inputs of shape \(1, 3, 256, 256\)"):
        vitrify.explain(build(), (3, 256, 256))
    with pytest.raises(InputError, match=r"unknown target 'tpu'.*Known: a100, cpu, h100"):
        vitrify.explain(build(), target="tpu")
    with pytest.raises(InputError, match="batch_size must be a positive whole number, not 0"):
        vitrify.explain(build(), batch_size=0)
    with pytest.raises(InputError, match="Linear does not say its image size"):
        vitrify.explain(nn.Linear(3, 3))
