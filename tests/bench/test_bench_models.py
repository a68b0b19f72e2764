import pytest
import torch

from vitrify.bench.model_checks import check_parts
from vitrify.bench.models import build, cost
from vitrify.bench.registry import prepare
from vitrify.convert import AttentionSpec, Recipe, convert_, recipes
from vitrify.errors import InputError
from vitrify.nn.attention import named_cores
from vitrify.nn.cores import Taylor

# timm's smallest ViT: 6 blocks, width 64, 2 heads of 32, patches of 16.
CASE = {"model": "test_vit", "image_size": 160, "batch_size": 1, "recipe": "taylor", "device": "cpu"}
CASE |= {"compile": False, "runtimes": False}


def test_both_contenders_pass_their_checks():
    prepared = prepare("models", CASE)
    assert [contender.name for contender in prepared.contenders] == ["original", "taylor"]
    assert prepared.baselines == {"original": "original", "taylor": "original"}
    for contender in prepared.contenders:
        check = contender.check(prepared.inputs(0))
        assert check.passed, (contender.name, check)


@torch.no_grad()
def test_a_wrong_core_is_found(monkeypatch):
    model = build("test_vit", 160).eval()
    convert_(model, recipes.taylor())
    images = torch.randn(1, 3, 160, 160)
    assert check_parts(model, images).passed
    last = list(named_cores(model).values())[-1]
    right = Taylor.forward
    monkeypatch.setattr(
        Taylor, "forward", lambda self, *args, **kwargs: right(self, *args, **kwargs) * (1.001 if self is last else 1)
    )
    check = check_parts(model, images)
    assert not check.passed
    assert "attention cores" in check.against


def test_squares_are_checked_in_float64():
    model = build("test_vit", 160).eval()
    convert_(model, Recipe("squares", AttentionSpec("taylor", squares=True)))
    check = check_parts(model, torch.randn(1, 3, 160, 160))
    assert check.passed, check
    assert "float64" in check.against


def test_cost_counts_layers_as_run_and_attention_by_its_formula():
    model = build("test_vit", 160).eval()
    convert_(model, recipes.softmax())
    images = torch.randn(1, 3, 160, 160)
    blocks, tokens, width, heads = len(model.blocks), 101, 64, 2
    hidden = model.blocks[0].mlp.fc1.out_features
    layers = 2 * tokens * width * (4 * width + 2 * hidden) * blocks  # qkv and projection, MLP
    patches = 2 * 100 * width * 3 * 16 * 16
    head = 2 * width * model.num_classes
    attention = 2 * 2 * tokens**2 * width * blocks
    assert model.blocks[0].attn.num_heads == heads
    assert cost(model, images).flops == layers + patches + head + attention


def test_bad_models_are_refused():
    with pytest.raises(InputError, match="deit_tiny_patch16_224"):
        prepare("models", {**CASE, "model": "deit_tiny_patch16_24"})
    with pytest.raises(InputError, match="changes nothing in 'resnet18'"):
        prepare("models", {**CASE, "model": "resnet18"})
    with pytest.raises(InputError, match="image_size 170 is not a multiple of the model's patch side 16"):
        prepare("models", {**CASE, "image_size": 170})


@pytest.mark.parametrize(("name", "size"), [("vit_mini_patch2_28", 28), ("pvt_mini_56", 56)])
def test_vitrifys_own_models_have_one_channel(name, size):
    prepared = prepare("models", {**CASE, "model": name, "image_size": size})
    images = prepared.inputs(0)
    assert images.shape == (1, 1, size, size)
    assert all(contender.check(images).passed for contender in prepared.contenders)
