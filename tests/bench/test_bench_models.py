import importlib.util

import pytest
import torch

from vitrify.bench.model_checks import check_parts
from vitrify.bench.models import build, cost
from vitrify.bench.registry import prepare
from vitrify.bench.runtimes import runtimes
from vitrify.convert import AttentionSpec, Recipe, convert_, pack_, recipes
from vitrify.errors import InputError
from vitrify.nn import ShiftLinear
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


INT8 = Recipe("int8", projections={"primitive": "shift", "activations": "int8"}, mlp="shift")


def test_a_packed_recipe_among_other_runtimes(tmp_path, monkeypatch):
    INT8.to_yaml(tmp_path / "int8.yaml")
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if "onnx" in name else found(name))
    prepared = prepare("models", {**CASE, "recipe": str(tmp_path / "int8.yaml"), "runtimes": True})
    contenders = {contender.name: contender for contender in prepared.contenders}
    assert {"original", "original bfloat16", "int8", "int8 bfloat16", "torch dynamic INT8"} <= contenders.keys()
    assert prepared.baselines["int8 bfloat16"] == "original bfloat16"
    assert prepared.baselines["torch dynamic INT8"] == "original"
    assert prepared.not_run["ONNX Runtime"] == "onnx, onnxscript, onnxruntime not installed"
    for name, contender in contenders.items():
        check = contender.check(prepared.inputs(0))
        assert check.passed, (name, check)
    assert "shift layers" in contenders["int8"].check(prepared.inputs(0)).against
    narrow, dense = contenders["int8"].cost, contenders["original"].cost
    tokens, width, blocks = 101, 64, 6
    assert narrow.narrow == {"int8": 2 * tokens * 4 * width * width * blocks}
    assert narrow.flops == dense.flops
    assert narrow.bytes_moved < 0.6 * dense.bytes_moved
    assert contenders["int8 bfloat16"].cost.narrow["int8"] == narrow.narrow["int8"]


def test_a_wrong_shift_layer_is_found(monkeypatch):
    model = build("test_vit", 160).eval()
    convert_(model, INT8)
    pack_(model)
    images = torch.randn(1, 3, 160, 160)
    assert check_parts(model, images).passed
    run = ShiftLinear.forward
    proj = model.blocks[3].attn.proj
    monkeypatch.setattr(ShiftLinear, "forward", lambda self, x: run(self, x) * (1.001 if self is proj else 1))
    assert not check_parts(model, images).passed


@pytest.mark.slow
def test_onnx_runtime_runs_the_original_and_its_int8():
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = build("test_vit", 160).eval().requires_grad_(False)
    images = torch.randn(1, 3, 160, 160)
    found, _ = runtimes(model, images)
    expected = model(images)
    errors = {}
    for name in ("ONNX Runtime", "ONNX Runtime dynamic INT8"):
        errors[name] = ((found[name](images) - expected).abs().max() / expected.abs().max()).item()
    assert errors["ONNX Runtime"] < 1e-5
    assert 1e-4 < errors["ONNX Runtime dynamic INT8"] < 0.25  # above: it does round


def test_on_a_gpu_none_of_these_runtimes_is_made():
    found, not_run = runtimes(torch.nn.Identity(), torch.empty(1, 3, 8, 8, device="meta"))
    assert not found
    assert not_run.keys() == {"TensorRT"}
