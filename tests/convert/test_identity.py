"""Recipe(attention="softmax") changes nothing: bit for bit, module by module, in training, nor the calls it makes."""

import copy

import pytest
import timm
import torch
from convert_helpers import attention_names, build, observe, vit
from timm.layers import set_fused_attn
from timm.layers.attention import Attention
from torch import nn

from vitrify import recipes
from vitrify.convert import convert_
from vitrify.convert.adapters.base import Adapter
from vitrify.convert.copies import randomise

PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "num_classes": 5}
FAMILIES = {
    "vit": vit,
    "vit-qk-norm": lambda: vit(qk_norm=True, scale_attn_norm=True),
    "vit-registers-layerscale": lambda: vit(reg_tokens=4, init_values=1e-5, no_embed_class=True),
    "vit-parallel": lambda: vit(block_fn=timm.models.vision_transformer.ParallelThingsBlock),
    "vit-res-post": lambda: vit(block_fn=timm.models.vision_transformer.ResPostBlock, init_values=1e-5),
    "vit-no-class-token": lambda: vit(class_token=False, global_pool="avg"),
    "deit-distilled": lambda: build(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5
    ),
    "siglip-map-pool": lambda: vit(class_token=False, global_pool="map"),
    "pvt": lambda: build("pvt_v2_b0", **PVT),
    "pvt-linear": lambda: build("pvt_v2_b2_li", **PVT),
    "mobilevit": lambda: build("mobilevit_xxs", num_classes=5),
}
SIZES = {"pvt": 64, "pvt-linear": 64, "mobilevit": 72}  # 72: not a multiple of every patch, so MobileViT resizes


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused(request):
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(True)


@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_is_the_original(family, fused):
    torch.set_num_threads(1)
    original = FAMILIES[family]()
    converted = copy.deepcopy(original)
    names = attention_names(convert_(converted, recipes.softmax()))
    assert len(names) >= 2
    assert all(converted.get_submodule(name).core.fused is fused for name in names)
    size = SIZES.get(family, 32)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    expected, expected_each, expected_calls = observe(original, names, x)
    actual, actual_each, actual_calls = observe(converted, names, x)
    assert torch.equal(expected, actual)
    assert expected_each.keys() == actual_each.keys() == set(names)
    for name in names:
        assert torch.equal(expected_each[name], actual_each[name]), name
        assert expected_each[name].std() > 1e-3  # not hidden behind zeros
    assert expected_calls == actual_calls


@pytest.mark.parametrize("family", ["vit", "pvt"])
def test_training_with_dropout_draws_the_same_numbers(family, fused):
    kwargs = {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_path_rate": 0.4}
    original = (vit(**kwargs) if family == "vit" else build("pvt_v2_b0", **PVT, **kwargs)).train()
    converted = copy.deepcopy(original)
    names = attention_names(convert_(converted, recipes.softmax()))
    x = torch.randn(2, 3, 64 if family == "pvt" else 32, 64 if family == "pvt" else 32)
    expected, expected_each, expected_calls = observe(original, names, x, seed=5)
    actual, actual_each, actual_calls = observe(converted, names, x, seed=5)
    assert torch.equal(expected, actual)
    assert all(torch.equal(expected_each[name], actual_each[name]) for name in names)
    assert expected_calls == actual_calls
    assert not torch.equal(actual, observe(converted, names, x, seed=6)[0])  # the dropout is really on
    expected.sum().backward()
    actual.sum().backward()
    for (name, a), b in zip(original.named_parameters(), converted.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_gates_and_dtypes(mask, dtype, fused):
    # Width 6 per head: 6 ** -0.5 and SDPA's 1 / sqrt(6) need not be the same double.
    original = Attention(
        24, num_heads=4, qkv_bias=True, qk_norm=True, gated=True, scale_norm=True, norm_layer=nn.LayerNorm
    )
    randomise(original, torch.Generator().manual_seed(1))
    original = original.to(dtype).eval()
    converted = copy.deepcopy(original)
    convert_(converted, recipes.softmax())
    assert isinstance(converted, Adapter)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 9, 24, generator=generator).to(dtype)
    allowed = torch.rand(2, 1, 9, 9, generator=generator) > 0.4
    allowed[..., 0] = True
    kwargs = {
        "none": {},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.randn(2, 1, 9, 9, generator=generator).to(dtype)},
        "causal": {"is_causal": True},
        "padding": {"attn_mask": allowed[:, :, :1]},
    }[mask]
    expected = original(x, **kwargs)
    assert torch.equal(expected, converted(x, **kwargs))
    if kwargs:
        assert not torch.equal(expected, converted(x))  # the mask does something


def test_verify_refuses_a_source_that_no_longer_matches(monkeypatch):
    def forward(self, x, attn_mask=None, is_causal=False):
        return original_forward(self, x, attn_mask, is_causal) * 1.001

    original_forward = Attention.forward
    monkeypatch.setattr(Attention, "forward", forward)
    model = vit()
    conversion = convert_(model, recipes.taylor())
    assert not conversion.changed
    assert len(conversion.refused) == 2
    assert "does not reproduce" in conversion.refused[0].detail
    assert type(model.blocks[0].attn) is Attention


def test_verify_disturbs_nothing():
    model = vit().train()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *a: calls.append(a))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    convert_(model, recipes.taylor())
    assert not calls
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for n, m in model.named_modules() if not n.endswith("core")]
    assert all(m.training for m in model.modules())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
