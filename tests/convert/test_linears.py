"""Linear layers by recipe: roles, patterns, whole MLPs, reconversion, refusals, and what survives."""

import copy

import pytest
import timm
import torch
from convert_helpers import vit
from torch import nn

from vitrify import recipes
from vitrify.convert import AttentionSpec, LinearSpec, Recipe, convert_, pack_
from vitrify.errors import InputError
from vitrify.nn import IntLinear, Mixture, MixtureLinear, MixtureMlp, ShiftConv2d, ShiftLinear

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def kinds(model):
    """Qualified name -> class, of every converted linear layer, convolution or MLP outside of mixtures."""
    ours = (ShiftLinear, ShiftConv2d, IntLinear, Mixture)
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, ours) and ".shift" not in n}


def test_projections_and_mlps_by_role():
    model = vit()
    parameters = dict(model.named_parameters())
    conversion = convert_(model, Recipe("mine", projections="shift", mlp=LinearSpec("integer", bits=8)))
    found = kinds(model)
    assert found == {
        f"blocks.{block}.{name}": kind
        for block in range(2)
        for name, kind in (
            ("attn.qkv", "ShiftLinear"),
            ("attn.proj", "ShiftLinear"),
            ("mlp.fc1", "IntLinear"),
            ("mlp.fc2", "IntLinear"),
        )
    }
    # The head and the patch embedding are in no block, and nothing else became a new object.
    assert type(model.head) is nn.Linear
    assert type(model.patch_embed.proj) is nn.Conv2d
    assert model.state_dict().keys() == vit().state_dict().keys()
    assert all(a is b for a, b in zip(model.parameters(), parameters.values(), strict=True))
    assert {c.name for c in conversion.changed} >= found.keys()
    assert "weight error" in next(c.detail for c in conversion.changed if c.name == "blocks.0.attn.qkv")


def test_a_shift_model_computes_with_its_decoded_weights():
    model = vit()
    reference = copy.deepcopy(model)
    convert_(model, Recipe("mine", projections="shift", mlp="shift"))
    for name, module in model.named_modules():
        if isinstance(module, ShiftLinear):
            reference.get_submodule(name).weight.data = module.decoded_weight()
    assert torch.equal(model(IMAGES), reference(IMAGES))


def test_an_mlp_is_one_mixture_and_pvts_layers_are_each_one():
    model = vit()
    convert_(model, Recipe("mine", mlp="mixture"))
    assert isinstance(model.blocks[0].mlp, MixtureMlp)
    assert isinstance(model.blocks[0].mlp, timm.layers.Mlp)
    assert set(kinds(model)) == {"blocks.0.mlp", "blocks.1.mlp"}
    pvt = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64)).eval()
    convert_(pvt, Recipe("mine", mlp="mixture"), input_size=(3, 64, 64))
    assert isinstance(pvt.stages[0].blocks[0].mlp.fc1, MixtureLinear)
    assert isinstance(pvt.stages[0].blocks[0].mlp.fc2, MixtureLinear)
    assert pvt(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_patterns_reach_any_linear_layer_and_convolution():
    model = vit()
    convert_(
        model, Recipe("mine", mlp="shift", modules={"head": "shift", "patch_embed.proj": "shift", "*.fc2": "multiply"})
    )
    assert kinds(model) == {
        "patch_embed.proj": "ShiftConv2d",
        "blocks.0.mlp.fc1": "ShiftLinear",
        "blocks.1.mlp.fc1": "ShiftLinear",
        "head": "ShiftLinear",
    }
    model = vit()
    convert_(model, Recipe("mine", modules={"blocks.1.mlp": "mixture", "blocks.0.mlp": LinearSpec("shift", bits=3)}))
    assert kinds(model) == {
        "blocks.0.mlp.fc1": "ShiftLinear",
        "blocks.0.mlp.fc2": "ShiftLinear",
        "blocks.1.mlp": "MixtureMlp",
    }
    assert model.blocks[0].mlp.fc1.bits == 3


def test_a_pattern_that_names_nothing_is_an_error_and_changes_nothing():
    model = vit()
    with pytest.raises(InputError, match=r"blocks\.9.*names no linear layer.*blocks\.0"):
        convert_(model, Recipe("mine", attention="taylor", modules={"blocks.9.mlp": "shift"}))
    assert not kinds(model)
    assert not hasattr(model, "_vitrify")


def test_converting_again_replaces_what_differs_and_keeps_what_was_learned():
    model = vit()
    weight = model.blocks[0].mlp.fc1.weight
    convert_(model, Recipe("one", mlp="mixture"))
    router = model.blocks[0].mlp.router
    convert_(model, Recipe("two", projections="shift", mlp="mixture"))
    assert model.blocks[0].mlp.router is router
    convert_(model, Recipe("three", mlp="shift"))
    assert set(kinds(model)) == {f"blocks.{b}.mlp.{n}" for b in range(2) for n in ("fc1", "fc2")}
    assert set(model._vitrify.applied) >= set(kinds(model))
    convert_(model, Recipe("four", mlp="mixture"))
    assert set(kinds(model)) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert not any(".fc" in name for name in model._vitrify.applied)
    convert_(model, recipes.softmax())
    assert not kinds(model)
    assert model.blocks[0].mlp.fc1.weight is weight
    assert type(model.blocks[0].mlp) is timm.layers.Mlp


def test_learned_codes_outlive_a_second_stage():
    model = vit()
    first = recipes.shiftaddvit()
    convert_(model, Recipe("attention", first.attention))
    core = model.blocks[0].attn.core
    core.query_binariser.threshold.data.fill_(0.25)
    convert_(model, Recipe("all", first.attention, projections="shift"))
    assert model.blocks[0].attn.core is core
    convert_(model, Recipe("other", AttentionSpec("hamming", form="taylor")))
    assert model.blocks[0].attn.core is not core


def test_filter_and_refusals():
    model = vit()
    conversion = convert_(model, Recipe("mine", mlp="shift"), lambda _, name: not name.startswith("blocks.0"))
    assert set(kinds(model)) == {"blocks.1.mlp.fc1", "blocks.1.mlp.fc2"}
    assert "blocks.0.mlp.fc1" in {c.name for c in conversion.kept}

    model = vit()
    model.blocks[0].mlp.fc1 = nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    conversion = convert_(model, Recipe("mine", mlp="shift", modules={"patch_embed.proj": "mixture"}))
    refused = {c.name: c.detail for c in conversion.refused}
    assert "plain linear" in refused["blocks.0.mlp.fc1"]
    assert "use 'shift'" in refused["patch_embed.proj"]


def test_a_layer_that_is_never_called_is_refused():
    class ReadsWeight(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = timm.layers.Attention(8, num_heads=2)
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.attn(x), self.fc.weight)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 8, 8)
            self.block = ReadsWeight()

        def forward(self, x):
            return self.block(self.stem(x).flatten(2).mT)

    model = Model()
    conversion = convert_(model, Recipe("mine", mlp="shift", projections="shift"), input_size=(3, 32, 32))
    assert {c.name for c in conversion.refused} == {"block.fc"}
    assert "never called" in conversion.refused[0].detail
    assert set(kinds(model)) == {"block.attn.qkv", "block.attn.proj"}


def test_packing_keeps_the_outputs():
    model = vit()
    convert_(model, recipes.vitrify())
    with torch.no_grad():
        before = model(IMAGES)
        count = pack_(model)
        assert torch.equal(model(IMAGES), before)
    assert count == 2 * (2 + 2)  # two projections and the mixture's two shifting layers in each block
    assert pack_(model) == 0
    conversion = convert_(model, Recipe("back", projections="multiply", mlp="multiply"))
    assert "packed" in {c.detail for c in conversion.refused if c.name == "blocks.0.attn.qkv"}.pop()


def test_convolutions_that_are_linear_layers_have_their_role():
    model = timm.create_model("levit_conv_128s")
    conversion = convert_(model, recipes.vitrify())
    changed = {c.name for c in conversion.changed}
    refused = {c.name: c.detail for c in conversion.refused}
    assert "stages.0.blocks.0.attn.qkv.linear" in changed
    assert "use 'shift'" in refused["stages.0.blocks.0.mlp.ln1.linear"]
    assert not any(name.startswith("stem") for name in (*changed, *refused))


@pytest.mark.parametrize("name", ["shiftaddvit", "vitrify"])
def test_the_papers_recipes_train(name):
    model = vit()
    convert_(model, recipes.get(name))
    model.train()
    model(IMAGES).square().mean().backward()
    mixtures = [m for m in model.modules() if isinstance(m, Mixture)]
    assert len(mixtures) == 2
    assert all(p.grad is not None for m in mixtures for p in m.router.parameters())
    weights = [m.weight for m in model.modules() if isinstance(m, ShiftLinear) and m.weight.grad is not None]
    assert weights


def test_the_last_pvt_stage_keeps_softmax():
    model = timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64))
    conversion = convert_(model, recipes.shiftaddvit())
    kept = {c.name: c.detail for c in conversion.kept}
    assert set(kept) == {"stages.3.blocks.0.attn"}
    assert "min_tokens" in kept["stages.3.blocks.0.attn"]
    assert model.stages[0].blocks[0].attn.core.form == "published"
