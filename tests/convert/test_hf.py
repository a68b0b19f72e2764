"""Hugging Face's ViT, DeiT, DINOv2 and SigLIP: identity, masks, grids, and what their callers rely on."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vitrify.convert import AttentionSpec, Recipe, convert_, pack_
from vitrify.convert.copies import randomise
from vitrify.errors import UnsupportedError
from vitrify.ops import taylor_attention

transformers = pytest.importorskip("transformers")
from vitrify.convert.adapters.hf import key_padding  # noqa: E402  # imports transformers

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 16}
PREFIX = {"ViT": 1, "DeiT": 2, "Dinov2": 1, "SiglipVision": 0}
FAMILIES = list(PREFIX)
MASKED = ["ViT", "DeiT", "Dinov2"]  # SigLIP's vision model takes no mask
TAYLOR = Recipe("taylor", "taylor", keep_if_costlier=False)


def build(family, implementation="sdpa", **config):
    """A model of 4 x 4 patches with random numbers everywhere, in eval mode."""
    settings = getattr(transformers, f"{family}Config")(**{**SIZES, "patch_size": 4, **config})
    model = getattr(transformers, f"{family}Model")._from_config(settings, attn_implementation=implementation)
    randomise(model, torch.Generator().manual_seed(7))
    return model.eval()


def images(height=16, width=16):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def attention_outputs(model, *args, **kwargs):
    """Run the model: (its output, (output, weights) of every attention by name)."""
    outputs, handles = {}, []
    for name, module in model.named_modules():
        if hasattr(module, "q_proj"):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: outputs.update({name: o})))
    result = model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    assert len(outputs) == 2
    return result, outputs


def padding(prefix):
    """All tokens of the first image, and all but the last five of the second."""
    mask = torch.ones(2, prefix + 16)
    mask[1, -5:] = 0
    return mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_softmax_recipe_is_the_identity(family, implementation):
    original = build(family, implementation).train()
    converted = copy.deepcopy(original)
    assert len(convert_(converted, Recipe("identity", "softmax")).changed) == 2
    assert list(converted.state_dict()) == list(original.state_dict())

    calls = [{"output_hidden_states": True}, {"output_attentions": True}]
    calls += [{"attention_mask": padding(PREFIX[family])}] if family in MASKED else []
    for kwargs in calls:
        expected, expected_outputs = attention_outputs(original, images(), **kwargs)
        actual, outputs = attention_outputs(converted, images(), **kwargs)
        for name, (out, weights) in expected_outputs.items():
            assert torch.equal(outputs[name][0], out), name
            assert (weights is None) == (implementation == "sdpa")
            assert weights is None or torch.equal(outputs[name][1], weights), name
        assert actual.keys() == expected.keys()
        assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)

    expected.last_hidden_state.square().sum().backward()
    actual.last_hidden_state.square().sum().backward()
    gradients = {name: p.grad for name, p in converted.named_parameters()}
    for name, parameter in original.named_parameters():
        # None on both sides: heads that last_hidden_state does not pass through.
        assert gradients[name] is parameter.grad or torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plain_path_is_the_eager_function_s(family):
    """bfloat16 shows that only DINOv2 leaves the softmax in the model's dtype."""
    model = build(family, "eager").bfloat16()
    convert_(model, Recipe("identity", "softmax"))
    kwargs = {"attention_mask": padding(PREFIX[family])} if family in MASKED else {}
    _, eager = attention_outputs(model, images(), **kwargs)
    for module in model.modules():
        if hasattr(module, "core"):
            module.core.fused = False
    _, plain = attention_outputs(model, images(), **kwargs)
    for name, (out, _) in eager.items():
        assert torch.equal(plain[name][0], out), name


def test_the_attention_function_is_chosen_when_called():
    model = build("ViT", "sdpa")
    convert_(model, Recipe("identity", "softmax"))
    model.set_attn_implementation("eager")
    weights = model(images(), output_attentions=True).attentions
    assert [w.shape for w in weights] == [(2, 2, 17, 17)] * 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_attention_takes_its_place(family, implementation):
    model = build(family, implementation)
    keys = list(model.state_dict())
    convert_(model, TAYLOR)
    assert list(model.state_dict()) == keys
    kwargs = {"attention_mask": padding(PREFIX[family])} if family in MASKED else {}
    tokens = 16 + PREFIX[family]
    calls = []
    for module in model.modules():
        if hasattr(module, "core"):
            module.core.register_forward_hook(lambda m, a, k, o: calls.append((a, k, o)), with_kwargs=True)
    hidden = model(images(), output_hidden_states=True, **kwargs).hidden_states
    assert len(hidden) == 3
    assert len(calls) == 2
    for (query, key, value, mask), core_kwargs, out in calls:
        assert query.shape == key.shape == value.shape == (2, 2, tokens, 8)
        expected_mask = kwargs["attention_mask"].bool()[:, None, None] if kwargs else None
        assert (mask is None) if expected_mask is None else torch.equal(mask, expected_mask)
        assert torch.equal(out, taylor_attention(query, key, value, expected_mask, scale=core_kwargs["scale"]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padded_patches_change_nothing(implementation):
    model = build("ViT", implementation)
    convert_(model, Recipe("conv", AttentionSpec("taylor", value_conv=3), keep_if_costlier=False))
    for name, parameter in model.named_parameters():
        if "value_conv" in name:
            torch.nn.init.normal_(parameter)
    mask, other = padding(1), images()
    other[1, :, 12:] += 1  # the last row of patches, tokens 13 to 16, is padded in the second image
    before = model(images(), attention_mask=mask).last_hidden_state
    after = model(other, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(after[:, :12], before[:, :12])
    assert not torch.allclose(after[1, 13:], before[1, 13:])
    assert not torch.allclose(model(other).last_hidden_state[1, :12], model(images()).last_hidden_state[1, :12])


def test_masks_are_read_exactly():
    keep = torch.tensor([[True, True, False], [True, False, False]])
    wide = keep[:, None, None].expand(2, 1, 4, 3)
    for ignored in (float("-inf"), torch.finfo(torch.float32).min):
        additive = torch.zeros(2, 1, 4, 3).masked_fill(~wide, ignored)
        assert torch.equal(key_padding(additive), keep[:, None, None])
    for mask in (keep, wide):
        assert torch.equal(key_padding(mask), keep[:, None, None])
    assert key_padding(None) is None


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        pytest.param(torch.ones(1, 1, 3, 3).tril().bool(), "varies over queries", id="causal"),
        pytest.param(torch.ones(1, 1, 3, 3).tril().log(), "varies over queries", id="causal-additive"),
        pytest.param(torch.tensor([0.0, -1.0, 0.0]).expand(1, 1, 3, 3), "other than 0 and -inf", id="bias"),
        pytest.param(torch.tensor([0.0, float("nan"), 0.0]).expand(1, 1, 3, 3), "varies|other", id="nan"),
        pytest.param(torch.ones(1, 2, 3, 3).bool(), r"shape \(1, 2, 3, 3\)", id="per-head"),
        pytest.param(torch.ones(1, 3), r"float32 of shape \(1, 3\)", id="two-axes-additive"),
        pytest.param(torch.ones(1, 1, 3, 3).long(), "int64", id="integers"),
        pytest.param("block", "is a str", id="no-tensor"),
    ],
)
def test_other_masks_are_refused(mask, message):
    with pytest.raises(UnsupportedError, match=message):
        key_padding(mask)


def test_a_compiled_graph_refuses_other_masks_too():
    torch.compiler.reset()
    compiled = torch.compile(key_padding, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(1, 1, 3, 3).bool()), torch.ones(1, 1, 1, 3).bool())
    with pytest.raises(RuntimeError, match="varies over queries"):
        compiled(torch.ones(1, 1, 3, 3).tril().bool())


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_refused_when_asked_for(family):
    model = build(family, "eager")
    convert_(model, TAYLOR)
    with pytest.raises(UnsupportedError, match="output_attentions=True: the Taylor core"):
        model(images(), output_attentions=True)
    assert model(images(), output_attentions=False).last_hidden_state.isfinite().all()
    model.config.output_attentions = True
    with pytest.raises(UnsupportedError, match="output_attentions=True"):
        model(images())


def test_arguments_that_change_the_attention_are_refused():
    attention = build("ViT").layers[0].attention
    convert_(attention, TAYLOR)
    x = torch.randn(2, 5, 16)
    expected = attention(x)[0]
    assert torch.equal(attention(x, output_hidden_states=True, is_causal=False, position_bias=None)[0], expected)
    with pytest.raises(UnsupportedError, match="is_causal=True"):
        attention(x, is_causal=True)
    with pytest.raises(UnsupportedError, match="softcap"):
        attention(x, softcap=30.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_dropout_is_refused(family):
    name = "attention_dropout" if family == "SiglipVision" else "attention_probs_dropout_prob"
    model = build(family, **{name: 0.25})
    refused = convert_(model, TAYLOR).refused
    assert sum("attention dropout 0.25" in change.detail for change in refused) == 2
    assert len(convert_(model, Recipe("identity", "softmax")).changed) == 2


def test_causal_modules_are_refused():
    model = build("ViT")
    model.layers[1].attention.is_causal = True
    conversion = convert_(model, TAYLOR)
    assert [(c.name, "is_causal" in c.detail) for c in conversion.refused] == [("layers.1.attention", True)]


def test_what_has_no_adapter_is_refused_by_name():
    conversion = convert_(build("SiglipVision"), TAYLOR)
    assert [(c.name, c.module_class.rsplit(".", 1)[1]) for c in conversion.refused] == [
        ("head.attention", "MultiheadAttention")
    ]
    registers = convert_(build("Dinov2WithRegisters"), TAYLOR)
    assert not registers.changed
    assert any("Dinov2WithRegisters" in change.detail for change in registers.refused)

    towers = {"text_config": {**SIZES, "vocab_size": 11}, "vision_config": {**SIZES, "patch_size": 4}}
    siglip = transformers.SiglipModel(transformers.SiglipConfig(**towers))
    conversion = convert_(siglip, TAYLOR)
    assert all(change.name.startswith("vision_model.") for change in conversion.changed)
    assert len(conversion.changed) == 2
    assert sum("text tower" in change.detail for change in conversion.refused) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_value_convolution_follows_the_image(family):
    """A zero convolution changes nothing; a random one adds the convolution of V over a grid that is not square."""
    kwargs = {} if family == "Dinov2" else {"interpolate_pos_encoding": True}
    model = build(family)
    plain = copy.deepcopy(model)
    convert_(model, Recipe("conv", AttentionSpec("softmax", value_conv=3)))
    pictures = images(12, 23)  # 3 x 5 patches, and three columns of pixels that belong to none
    assert torch.equal(model(pictures, **kwargs).last_hidden_state, plain(pictures, **kwargs).last_hidden_state)

    (name, attention), *_ = [(n, m) for n, m in model.named_modules() if hasattr(m, "core")]
    torch.nn.init.normal_(attention.value_conv.conv.weight)
    seen = []
    attention.register_forward_hook(
        lambda m, a, k, o: seen.append((a[0] if a else k["hidden_states"], o[0])), with_kwargs=True
    )
    copy.deepcopy(model)(images(), **kwargs)  # a copy reads its own grid
    seen.clear()
    model(pictures, **kwargs)
    ((x, out),) = seen

    prefix, source = PREFIX[family], plain.get_submodule(name)
    value = source.v_proj(x)[:, prefix:].mT.unflatten(2, (3, 5))
    local = F.conv2d(value, attention.value_conv.conv.weight, padding=1, groups=16).flatten(2).mT
    projection = source.out_proj if family == "SiglipVision" else source.o_proj
    expected = source(x)[0] + F.linear(F.pad(local, (0, 0, prefix, 0)), projection.weight)
    torch.testing.assert_close(out, expected)


def test_a_convolution_needs_an_encoder_around_it():
    attention = build("ViT").layers[0].attention
    conversion = convert_(attention, Recipe("conv", AttentionSpec("softmax", value_conv=3)))
    assert "token grid" in conversion.refused[0].detail


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = build(family).train()
    convert_(model, Recipe("sparse", AttentionSpec("taylor_sparse", threshold=0.05, value_conv=3)))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        model(images()).last_hidden_state.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("value_conv" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize(("family", "core"), [("ViT", "softmax"), *((family, "taylor") for family in FAMILIES)])
def test_compiles_without_graph_breaks(family, core):
    model = build(family)
    convert_(model, Recipe("conv", AttentionSpec(core, value_conv=3), keep_if_costlier=False))
    kwargs = {"attention_mask": padding(PREFIX[family])} if family in MASKED else {}
    expected = model(images(), **kwargs).last_hidden_state
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images(), **kwargs).last_hidden_state, expected)


def test_a_classifier_states_its_costs():
    settings = transformers.ViTConfig(**{**SIZES, "image_size": 32, "patch_size": 4})
    model = transformers.ViTForImageClassification(settings)
    conversion = convert_(model, Recipe("taylor", "taylor"))
    assert [change.name for change in conversion.changed] == ["vit.layers.0.attention", "vit.layers.1.attention"]
    # Per head: softmax 2 * 65^2 * 8, Taylor 2 * 65 * 8^2.
    assert "65 queries, 65 keys: 67,600 -> 8,320 multiplications" in conversion.changed[0].detail
    assert conversion.input_size == (3, 32, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_shift_and_mlps_become_one_mixture(family):
    model = build(family)
    keys = set(model.state_dict())
    recipe = Recipe("all", "taylor", projections="shift", mlp="mixture", keep_if_costlier=False)
    conversion = convert_(model, recipe)
    changed = [change.name for change in conversion.changed]
    blocks = [name for name in changed if name.endswith(".mlp")]
    assert len(blocks) == 2 + (family == "SiglipVision")  # SigLIP's pooling head has an MLP too
    assert sum(name.endswith(("q_proj", "k_proj", "v_proj")) for name in changed) == 6
    assert keys <= set(model.state_dict())
    model.train()
    model(images()).last_hidden_state.square().mean().backward()
    assert all(model.get_submodule(name).router.weight.grad.abs().sum() > 0 for name in blocks if "head" not in name)
    with torch.no_grad():
        before = model.eval()(images()).last_hidden_state
        assert pack_(model) == 2 * (4 + 2) + 2 * (family == "SiglipVision")
        assert torch.equal(model(images()).last_hidden_state, before)
