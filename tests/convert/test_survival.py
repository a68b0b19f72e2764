"""What timm and torch do with a model still works on a converted one: tracing, compiling, checkpointing, copying."""

import copy

import pytest
import torch
from convert_helpers import build, vit
from timm.layers import set_fused_attn
from timm.models import create_feature_extractor, get_graph_node_names
from timm.utils import AttentionExtract

from vitrify import recipes
from vitrify.convert import AttentionSpec, Recipe, convert_

CONV = Recipe("conv", AttentionSpec("taylor_sparse", threshold=0.1, value_conv=3), keep_if_costlier=False)
RECIPES = {
    "softmax": recipes.softmax(),
    "taylor": Recipe("taylor", "taylor", keep_if_costlier=False),
    "vitality": Recipe("vitality", AttentionSpec("taylor_sparse", threshold=0.1), keep_if_costlier=False),
    "conv": CONV,
    "squares": Recipe("squares", AttentionSpec("taylor", squares=True), keep_if_costlier=False),
    "sparse": Recipe("sparse", AttentionSpec("sparse", threshold=0.05), keep_if_costlier=False),
}
PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "num_classes": 5}


# torchvision says so when training has nodes of its own; that is what the sparse part is.
pytestmark = pytest.mark.filterwarnings("ignore:.*nodes obtained by tracing the model")


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    """Each test compiles the same code objects, and Dynamo gives up after eight."""
    torch.compiler.reset()


@pytest.fixture(params=RECIPES)
def converted(request):
    model = vit(reg_tokens=2, init_values=0.1, qk_norm=True)
    convert_(model, RECIPES[request.param])
    for name, parameter in model.named_parameters():
        if "value_conv" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def image(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("train", [False, True])
def test_fx_feature_extraction(converted, train):
    converted.train(train)
    expected = converted(image())
    node = "blocks.1.attn.proj"
    assert node in get_graph_node_names(converted)[train is False]
    extractor = create_feature_extractor(converted, {node: "attention", "head": "logits"})
    extractor.train(train)
    out = extractor(image())
    torch.testing.assert_close(out["logits"], expected)
    assert out["attention"].shape == (2, 19, 24)
    # Tracing leaves nothing behind that breaks the model itself.
    torch.testing.assert_close(converted(image()), expected)
    torch.testing.assert_close(copy.deepcopy(converted)(image()), expected)


@pytest.mark.parametrize("train", [False, True])
def test_compiles_without_graph_breaks(converted, train):
    converted.train(train)
    expected = converted(image())
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image()), expected)
    torch.testing.assert_close(compiled(image()), expected)


def test_gradient_checkpointing(converted):
    converted.train()
    plain = copy.deepcopy(converted)
    converted.set_grad_checkpointing()
    plain(image()).square().sum().backward()
    converted(image()).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), converted.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, msg=name)
    for a, b in zip(plain.buffers(), converted.buffers(), strict=True):
        assert torch.equal(a, b) or (a.isnan() and b.isnan())


def test_forward_intermediates(converted):
    final, intermediates = converted.forward_intermediates(image(), indices=[0, 1])
    assert [tuple(i.shape) for i in intermediates] == [(2, 24, 4, 4)] * 2
    torch.testing.assert_close(converted.forward_head(final), converted(image()))


def test_copies_are_independent(converted):
    expected = converted(image())
    other = copy.deepcopy(converted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    assert torch.equal(converted(image()), expected)
    assert not torch.allclose(other(image()), expected, atol=1e-3)


def test_state_dict_round_trip(converted, tmp_path):
    torch.save(converted.state_dict(), tmp_path / "weights.pt")
    other = vit(reg_tokens=2, init_values=0.1, qk_norm=True)
    convert_(other, converted._vitrify.recipe)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(image()), converted(image()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_the_model(converted, dtype):
    expected = converted(image())
    out = converted.to(dtype)(image().to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.15 if dtype == torch.bfloat16 else 1e-4)


def test_autocast_with_query_norms(converted):
    # The norms return float32 beside a bfloat16 V.
    converted.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = converted(image())
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())


def test_export(converted):
    program = torch.export.export(converted, (image(),))
    torch.testing.assert_close(program.module()(image()), converted(image()))


def test_pruning_blocks_and_classifier(converted):
    converted.reset_classifier(3)
    converted.prune_intermediate_layers(1, prune_head=False)
    assert converted(image()).shape == (2, 3)


def test_attention_maps_are_still_hooked():
    set_fused_attn(False)
    try:
        model = vit()
    finally:
        set_fused_attn(True)
    expected = AttentionExtract(copy.deepcopy(model), method="hook", hook_type="forward")(image())
    convert_(model, recipes.softmax())
    actual = AttentionExtract(model, method="hook", hook_type="forward")(image())
    assert len(expected) == 2
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("family", ["pvt_v2_b0", "mobilevit_xxs"])
@pytest.mark.parametrize("recipe", ["softmax", "vitality"])
def test_other_families_trace_compile_and_checkpoint(family, recipe):
    model = build(family, **(PVT if "pvt" in family else {"num_classes": 5}))
    names = [c.name for c in convert_(model, RECIPES[recipe]).changed]
    expected = model(image(64))
    extractor = create_feature_extractor(model, {"head.fc" if "mobile" in family else "head": "logits"})
    torch.testing.assert_close(extractor(image(64))["logits"], expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image(64)), expected)
    torch.testing.assert_close(model.forward_intermediates(image(64))[0], model.forward_features(image(64)))
    model.train().set_grad_checkpointing()
    model(image(64)).sum().backward()
    assert all(p.grad is not None for name in names for p in model.get_submodule(name).parameters())
