"""convert_: what it changes, keeps and refuses, and what it says about it."""

import copy
import json

import pytest
import timm
import torch
from convert_helpers import Fake, build, observe, vit
from timm.layers.attention import Attention
from torch import nn

from vitrify import recipes
from vitrify.convert import AttentionSpec, Conversion, Recipe, convert_
from vitrify.convert.adapters.base import Adapter
from vitrify.convert.copies import randomise
from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import Softmax, Taylor, TaylorSparse

ATTENTIONS = ["blocks.0.attn", "blocks.1.attn"]
ANY_COST = {"keep_if_costlier": False}


def expected_taylor(attention, x):
    """The layer by hand: its own projections around the quadratic form of the first-order expansion."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * attention.scale
    weights = (1 + scores - scores.mean(-1, keepdim=True)) / k.shape[2]
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


def test_taylor_replaces_the_attention_and_nothing_else():
    original, converted = vit(), vit()
    conversion = convert_(converted, recipes.taylor())
    assert [change.name for change in conversion.changed] == ATTENTIONS
    assert not conversion.kept + conversion.refused + conversion.notes
    x = torch.randn(2, 17, 24)
    for name in ATTENTIONS:
        source, module = original.get_submodule(name), converted.get_submodule(name)
        assert isinstance(module.core, Taylor)
        torch.testing.assert_close(module(x), expected_taylor(source, x))
        assert not torch.allclose(module(x), source(x), atol=1e-3)
        assert isinstance(module, Attention)
    assert converted._vitrify is conversion
    assert conversion.input_size == (3, 32, 32)


def test_objects_keys_and_modes_survive():
    model = vit().train()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    model.blocks[1].eval()
    children = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    keys = list(model.state_dict())
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda m, i, o: seen.append(o))
    convert_(model, recipes.vitality())
    assert {n: id(m) for n, m in model.named_modules() if not n.endswith(".core")} == children
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    assert model.blocks[0].attn.core.training
    assert not model.blocks[1].attn.core.training
    model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 1


def test_vitality_trains_with_the_sparse_part_and_serves_without():
    model, low_rank = vit(), vit()
    convert_(model, Recipe(attention=AttentionSpec("taylor_sparse", threshold=0.1)))
    convert_(low_rank, recipes.taylor())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), low_rank(x))
    assert not torch.allclose(model.train()(x), low_rank.train()(x), atol=1e-4)
    assert all(0 < model.get_submodule(name).core.density < 1 for name in ATTENTIONS)


def test_converting_again_replaces_cores():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    convert_(model, recipes.vitality())
    assert isinstance(model.blocks[0].attn.core, TaylorSparse)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    conversion = convert_(model, recipes.softmax())
    assert [change.module_class for change in conversion.changed] == ["timm.layers.attention.Attention"] * 2
    assert isinstance(model.blocks[0].attn.core, Softmax)
    assert torch.equal(model(x), expected)
    assert [name for name, _ in model.named_modules() if name.endswith("core")] == [f"{n}.core" for n in ATTENTIONS]


def test_converting_again_keeps_a_trained_convolution_of_the_same_size():
    model = vit()
    convert_(model, Recipe(attention=AttentionSpec("taylor", value_conv=3)))
    convolution = model.blocks[0].attn.value_conv
    nn.init.ones_(convolution.conv.weight)
    convert_(model, Recipe(attention=AttentionSpec("taylor_sparse", value_conv=3)))
    assert model.blocks[0].attn.value_conv is convolution
    # Few tokens: counting the larger convolution, the default would keep softmax.
    convert_(model, Recipe(attention=AttentionSpec("taylor_sparse", value_conv=5), keep_if_costlier=False))
    assert model.blocks[0].attn.value_conv.conv.weight.shape[-2:] == (5, 5)
    assert not model.blocks[0].attn.value_conv.conv.weight.any()
    convert_(model, recipes.taylor())
    assert model.blocks[0].attn.value_conv is None
    assert list(model.state_dict()) == list(vit().state_dict())


def test_patterns_choose_specs_and_filters_keep():
    model = vit(depth=4)
    recipe = Recipe(attention="taylor", modules={"blocks.1.*": "softmax", "blocks.2.attn": "taylor_sparse"})
    conversion = convert_(model, recipe, lambda module, name: name != "blocks.3.attn")
    cores = [type(block.attn.core) for block in model.blocks[:3]]
    assert cores == [Taylor, Softmax, TaylorSparse]
    assert type(model.blocks[3].attn) is Attention
    assert [(change.name, change.detail) for change in conversion.kept] == [("blocks.3.attn", "filter_fn left it out")]
    assert {name: spec.core for name, spec in conversion.applied.items()} == {
        "blocks.0.attn": "taylor",
        "blocks.1.attn": "softmax",
        "blocks.2.attn": "taylor_sparse",
    }


def test_resolved_recipe_repeats_a_filtered_conversion():
    model = vit(depth=3)
    recipe = Recipe("mine", attention=AttentionSpec("taylor", value_conv=3))
    conversion = convert_(model, recipe, lambda module, name: "1" not in name)
    other = vit(depth=3)
    resolved = Recipe.from_dict(json.loads(json.dumps(conversion.resolved.to_dict())))
    convert_(other, resolved)
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), other(x))


def test_patterns_that_name_nothing_are_errors_and_change_nothing():
    model = vit()
    with pytest.raises(InputError, match=r"'block\.0\.attn'.*did you mean 'blocks\.0\.attn'"):
        convert_(model, Recipe(attention="taylor", modules={"block.0.attn": "softmax"}))
    assert type(model.blocks[0].attn) is Attention


def test_recipes_and_sizes_are_checked():
    model = vit()
    with pytest.raises(InputError, match=r"recipe must be a Recipe.*'taylor'"):
        convert_(model, "taylor")
    with pytest.raises(InputError, match=r"input_size must be \(channels, height, width\).*\(32, 32\)"):
        convert_(model, recipes.taylor(), input_size=(32, 32))
    with pytest.raises(InputError, match=r"input_size \(3, 48, 48\) does not suit the model"):
        convert_(model, recipes.taylor(), input_size=(3, 48, 48))
    assert type(model.blocks[0].attn) is Attention
    assert not hasattr(model, "_vitrify")


def test_a_bare_attention_module_converts():
    attention = Attention(24, num_heads=3)
    conversion = convert_(attention, recipes.taylor())
    assert [change.name for change in conversion.changed] == [""]
    assert "token count unknown, cost not checked" in str(conversion)
    assert "(the model)" in str(conversion)
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(attention(x), expected_taylor(attention, x))


def test_without_attention_nothing_is_listed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    conversion = convert_(model, recipes.taylor())
    assert not conversion.changed + conversion.kept + conversion.refused


def test_costlier_attention_is_kept_with_both_numbers():
    # 5 tokens of 3 heads of 8: softmax 5 * 5 * 16 = 400, Taylor 10 * 64 = 640.
    model = vit(img_size=16)
    conversion = convert_(model, recipes.vitality())
    assert [change.name for change in conversion.kept] == ATTENTIONS
    assert type(model.blocks[0].attn) is Attention
    for part in ("5 queries, 5 keys", "640", "400"):
        assert part in conversion.kept[0].detail
    # At a larger size it pays; and where the recipe does not ask, it is not checked.
    larger = vit(img_size=16, dynamic_img_size=True)
    assert len(convert_(larger, recipes.vitality(), input_size=(3, 64, 64)).changed) == 2
    assert len(convert_(model, Recipe(attention="taylor", **ANY_COST)).changed) == 2
    # Converting again with the check gives the softmax back.
    x = torch.randn(2, 3, 16, 16)
    assert len(convert_(model, recipes.taylor()).kept) == 2
    assert isinstance(model.blocks[0].attn.core, Softmax)
    assert torch.equal(model(x), vit(img_size=16)(x))


def test_mobilevit_keeps_its_16_token_stage():
    conversion = convert_(build("mobilevit_xxs"), recipes.taylor())
    assert [change.name.split(".")[1] for change in conversion.changed] == ["2"] * 2 + ["3"] * 4
    assert [change.name.split(".")[1] for change in conversion.kept] == ["4"] * 3
    assert all("16 queries, 16 keys" in c.detail and "18,432" in c.detail for c in conversion.kept)
    assert "256 queries, 256 keys" in conversion.changed[0].detail
    assert conversion.input_size == (3, 256, 256)


def test_token_counts_leave_no_trace():
    model = build("mobilevit_xxs")
    before = {name: tensor.clone() for name, tensor in model.train().state_dict().items()}
    state = torch.get_rng_state()
    convert_(model, recipes.taylor())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model.state_dict()["stem.bn.running_mean"]) is torch.Tensor
    assert model.stages[2][1].transformer[0].attn.core.training


def test_attention_dropout_is_refused_except_by_softmax():
    model = vit(attn_drop_rate=0.1)
    conversion = convert_(model, recipes.taylor())
    assert [change.name for change in conversion.refused] == ATTENTIONS
    assert "attention dropout 0.1" in conversion.refused[0].detail
    assert type(model.blocks[0].attn) is Attention
    assert len(convert_(model, recipes.softmax()).changed) == 2


def test_unknown_attention_is_refused_by_class():
    class Mine(Attention):
        """A subclass may compute anything."""

    model = nn.ModuleDict(
        {"fake": Fake(), "mine": Mine(8, 2), "torch": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)}
    )
    conversion = convert_(model, recipes.taylor())
    assert not conversion.changed
    refused = {change.name: change.detail for change in conversion.refused}
    assert refused.keys() == {"fake", "mine", "torch"}
    assert "Fake" in refused["fake"]
    assert "Mine" in refused["mine"]
    assert "MultiheadAttention" in refused["torch"]


def test_pooling_attention_is_refused():
    model = vit(class_token=False, global_pool="map")
    conversion = convert_(model, recipes.taylor())
    assert [change.name for change in conversion.changed] == ATTENTIONS
    assert [change.name for change in conversion.refused] == ["attn_pool"]


def test_masks_of_a_converted_model():
    attention = vit().blocks[0].attn
    convert_(attention, Recipe(attention="taylor"))
    x = torch.randn(2, 9, 24)
    keep = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    keep[..., 6:] = False
    torch.testing.assert_close(attention(x, attn_mask=keep)[:, :6], attention(x[:, :6]))
    with pytest.raises(UnsupportedError, match="key-padding"):
        attention(x, attn_mask=torch.zeros(9, 9))
    with pytest.raises(UnsupportedError, match="is_causal"):
        attention(x, is_causal=True)


@pytest.mark.parametrize("linear", [False, True])
def test_pvt_in_linear_order(linear):
    kwargs = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "num_classes": 5}
    original = build("pvt_v2_b0", linear=linear, **kwargs)
    converted = copy.deepcopy(original)
    conversion = convert_(converted, Recipe(attention="taylor", **ANY_COST))
    assert len(conversion.changed) == 4
    x = torch.randn(2, 3, 64, 96)
    names = [change.name for change in conversion.changed]
    _, _, calls = observe(original, names, x)
    _, _, calls_after = observe(converted, names, x)
    assert calls == calls_after
    # The first stage by hand: 16 x 24 queries; keys and values from the reduced grid.
    source, module = original.stages[0].blocks[0].attn, converted.stages[0].blocks[0].attn
    tokens = torch.randn(2, 16 * 24, 8)
    image = tokens.mT.unflatten(2, (16, 24))
    reduced = source.norm(source.sr(source.pool(image) if linear else image).flatten(2).mT)
    reduced = source.act(reduced) if linear else reduced
    assert reduced.shape[1] == (49 if linear else 2 * 3)
    q = source.q(tokens).unsqueeze(1)
    k, v = source.kv(reduced).unflatten(-1, (2, 1, 8)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * source.scale
    weights = (1 + scores - scores.mean(-1, keepdim=True)) / reduced.shape[1]
    torch.testing.assert_close(module(tokens, (16, 24)), source.proj((weights @ v).squeeze(1)))


def test_report_reads_well_and_is_json():
    model = vit()
    conversion = convert_(model, Recipe("mine", attention="taylor"), lambda module, name: name == "blocks.0.attn")
    text = str(conversion)
    assert text.splitlines()[0] == "recipe 'mine': 1 changed, 1 kept, 0 refused"
    assert "17 queries, 17 keys: 4,624 -> 2,176 multiplications per head" in text
    data = json.loads(json.dumps(conversion.to_dict()))
    assert data["kept"][0]["name"] == "blocks.1.attn"
    assert Recipe.from_dict(data["recipe"]) == conversion.recipe
    assert isinstance(copy.deepcopy(model)._vitrify, Conversion)


def test_a_model_on_meta_converts():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    conversion = convert_(model, Recipe(attention=AttentionSpec("taylor_sparse", value_conv=3)))
    assert len(conversion.changed) == 2
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    assert model.blocks[0].attn.core.threshold == torch.tensor(0.02)
    randomise(model, torch.Generator().manual_seed(0))
    assert model.train()(torch.randn(2, 3, 32, 32)).isfinite().all()
    assert isinstance(model.blocks[0].attn, Adapter)
