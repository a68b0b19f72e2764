"""Converting a GNT by the usual recipes: ray attention takes every core, view attention is kept, MLPs are mixed."""

import copy
import dataclasses

import pytest
import torch
from tiny_gnt import batch, tiny

from vitrify import AttentionSpec, LinearSpec, Recipe, convert_, load, recipes, save, workload
from vitrify.convert.adapters.base import Adapter
from vitrify.errors import InputError
from vitrify.nn import Hamming, MixtureMlp, ShiftLinear, Taylor, calibrate_codes_
from vitrify.nvs.transformer import RayAttention, ViewAttention
from vitrify.ops import taylor_weights

FREE = {"keep_if_costlier": False}
ADDITIVE = AttentionSpec("hamming")


def converted(recipe, **changes):
    model = tiny(**changes)
    return model, convert_(model, recipe)


@pytest.mark.parametrize("fused", [True, False])
def test_softmax_is_kept_bit_for_bit(fused):
    model, (rays, _) = tiny(), batch()
    for block in model.coarse.blocks:
        block.ray.attn.fused_attn = fused
    before = model(rays).rgb
    conversion = convert_(model, recipes.softmax())
    assert [change.name for change in conversion.changed] == [f"coarse.blocks.{i}.ray.attn" for i in range(2)]
    assert all(isinstance(model.get_submodule(change.name), RayAttention) for change in conversion.changed)
    assert torch.equal(model(rays).rgb, before)


def test_view_attention_is_kept_with_the_reason():
    model, conversion = converted(Recipe(attention="taylor", **FREE))
    kept = {change.name: change.detail for change in conversion.kept}
    assert list(kept) == [f"coarse.blocks.{i}.view.attn" for i in range(2)]
    assert all("no product of Q and K" in detail for detail in kept.values())
    assert type(model.coarse.blocks[0].view.attn) is ViewAttention
    assert conversion.refused == []


def test_taylor_is_the_definition_and_its_weights_are_its_own():
    model, _ = converted(Recipe(attention="taylor", **FREE))
    attention = model.coarse.blocks[0].ray.attn
    assert isinstance(attention, Adapter)
    x = torch.randn(3, 8, 16)
    query, key, value = (attention.heads(layer(x)) for layer in (attention.query, attention.key, attention.value))
    weights = taylor_weights(query, key, scale=attention.scale)
    torch.testing.assert_close(attention(x), attention.merge(weights @ value))
    positive = weights.mean((1, 2)).clamp(min=0)
    torch.testing.assert_close(attention.weights(x), positive / positive.sum(-1, keepdim=True))


def test_both_orders_of_additive_attention_agree():
    rays, _ = batch()
    results = []
    for order in ("linear", "quadratic"):
        model, _ = converted(Recipe(attention=dataclasses.replace(ADDITIVE, order=order)))
        fits = calibrate_codes_(model, rays)
        assert set(fits) == {f"coarse.blocks.{i}.ray.attn.core" for i in range(2)}
        assert isinstance(model.coarse.blocks[1].ray.attn.core, Hamming)
        results.append(model(rays).rgb)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec("softmax"),
        AttentionSpec("taylor"),
        ADDITIVE,
        AttentionSpec("hamming", form="taylor"),
        AttentionSpec("taylor_sparse"),
    ],
    ids=str,
)
def test_every_core_says_how_deep_a_ray_ends(spec):
    model, _ = converted(Recipe(attention=spec, **FREE))
    rays, _ = batch()
    out = model(rays)
    weights = model.coarse.weights(out.tokens, out.encoding)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(40))
    assert ((model.depth(out) > 1) & (model.depth(out) < 6)).all()


def test_the_weights_of_softmax_survive_the_conversion():
    model, (rays, _) = tiny(), batch()
    before = model.depth(model(rays))
    convert_(model, recipes.softmax())
    torch.testing.assert_close(model.depth(model(rays)), before)


def test_a_value_conv_runs_along_the_ray():
    model, conversion = converted(Recipe(attention=AttentionSpec("taylor", value_conv=3), **FREE))
    attention = model.coarse.blocks[0].ray.attn
    assert attention.value_conv.conv.weight.shape == (16, 1, 1, 3)
    assert "along the ray, 3 points wide" in conversion.changed[0].detail
    x = torch.randn(2, 8, 16)
    before = attention(x)
    with torch.no_grad():
        attention.value_conv.conv.weight[..., 0] = 1.0
    value = attention.heads(attention.value(x))
    shifted = torch.cat([torch.zeros_like(value[:, :, :1]), value[:, :, :-1]], 2)
    added = attention.merge(shifted) - attention.out.bias
    torch.testing.assert_close(attention(x), before + added)


def test_linear_layers_shift_and_mlps_mix():
    recipe = Recipe(projections=LinearSpec("shift", bits=5), mlp=LinearSpec("mixture", bits=5))
    model, conversion = converted(recipe)
    view, ray = model.coarse.blocks[0].view, model.coarse.blocks[0].ray
    assert all(isinstance(getattr(view.attn, name), ShiftLinear) for name in ("query", "key", "value", "out"))
    assert isinstance(view.attn.position.fc1, ShiftLinear)
    assert isinstance(view.attn.score.fc2, ShiftLinear)
    assert all(isinstance(mlp, MixtureMlp) for mlp in (view.mlp, ray.mlp, ray.place))
    assert conversion.refused == []
    rays, _ = batch()
    assert model(rays).rgb.isfinite().all()


def test_costs_are_compared_at_the_models_own_number_of_points():
    _, conversion = converted(Recipe(attention="taylor"), points=64, num_heads=4)
    assert "64 queries, 64 keys: 32,768 -> 2,048 multiplications per head" in conversion.changed[0].detail
    assert conversion.notes == []
    _, conversion = converted(recipes.shiftaddvit(), points=32)
    assert any("fewer than min_tokens, 64" in change.detail for change in conversion.kept)


def test_dropout_is_refused():
    _, conversion = converted(Recipe(attention="taylor", **FREE), dropout=0.1)
    assert len(conversion.refused) == 2
    assert "dropout 0.1" in conversion.refused[0].detail


@pytest.mark.parametrize(
    "recipe", [recipes.softmax(), Recipe(attention="taylor", **FREE), recipes.vitrify()], ids=lambda r: r.name
)
def test_the_workload_knows_every_operation(recipe):
    model, _ = converted(recipe)
    rays, _ = batch()
    graph = workload(model, example_inputs=(rays,))
    assert graph.unknown == {}
    modules = {operation.module for operation in graph.operations}
    assert {"coarse.blocks.0.view.attn", "coarse.blocks.0.ray.attn", "encoder.stem"} <= {
        m.removesuffix(".core") for m in modules
    }


def test_taylor_removes_products_of_the_ray_attention_alone():
    rays, _ = batch()
    counts = []
    for recipe in (recipes.softmax(), Recipe(attention="taylor", **FREE)):
        model, _ = converted(recipe, points=64)
        operations = workload(model, example_inputs=(rays,)).operations
        counts.append(sum(op.macs for op in operations if op.kind in ("matmul", "conv")))
    attentions, heads, per_head = 2 * 40, 4, 2 * 64 * 64 * 4 - 2 * 64 * 4 * 4
    assert counts[0] - counts[1] == attentions * heads * per_head


@pytest.mark.parametrize(
    "recipe", [None, recipes.vitrify(), Recipe(attention=ADDITIVE)], ids=["plain", "vitrify", "additive"]
)
def test_an_artefact_builds_its_own_model(tmp_path, recipe):
    model, (rays, _) = tiny(), batch()
    if recipe is not None:
        convert_(model, recipe)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.architecture == model.architecture
    assert torch.equal(again(rays).rgb, model(rays).rgb)


def test_a_changed_model_is_not_recorded_as_its_architecture(tmp_path):
    model = tiny()
    model.coarse.colour = torch.nn.Linear(16, 4)
    with pytest.warns(UserWarning, match="only `vitrify.load"):
        save(model, tmp_path / "model")
    with pytest.raises(InputError, match="build the same model yourself"):
        load(tmp_path / "model")


def test_copies_are_independent():
    model, _ = converted(Recipe(attention="taylor", **FREE))
    twin = copy.deepcopy(model)
    assert isinstance(twin.coarse.blocks[0].ray.attn.core, Taylor)
    with torch.no_grad():
        twin.coarse.colour.weight.zero_()
    assert model.coarse.colour.weight.any()
