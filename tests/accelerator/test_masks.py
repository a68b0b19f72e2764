"""Masks: what is captured is what the predictor keeps in the model; files hold them whole; synthetic ones say so."""

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitrify
import vitrify.models
from vitrify.accelerator.capture import CHUNK, capture_masks
from vitrify.accelerator.masks import LayerMask, Masks, synthetic_for, synthetic_masks
from vitrify.accelerator.packing import load_balance, polarise
from vitrify.data import load_dataset
from vitrify.data.transforms import build_transform
from vitrify.errors import InputError, UnsupportedError
from vitrify.ops import sparse_mask

LAYERS = [f"blocks.{i}.attn" for i in range(4)]


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_mini_patch2_28", pretrained=True).eval()


@pytest.fixture(scope="module")
def images(model):
    config = timm.data.resolve_model_data_config(model)
    transform = build_transform(config["input_size"], config["mean"], config["std"], train=False)
    data = load_dataset("fashion-mnist:shipped", "test", transform=transform)
    return torch.stack([data[i][0] for i in range(CHUNK + 2)])


@pytest.fixture(scope="module")
def captured(model, images):
    return capture_masks(model, images, density=0.2)


def expected_mask(model, images, block, threshold):
    """The predictor on what timm's own attention computes, written out."""
    attention = model.blocks[block].attn
    seen = {}
    with attention.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0])), torch.no_grad():
        model(images)
        x = seen["x"]
        batch, tokens, _ = x.shape
        query, key, _ = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return sparse_mask(query, key, scale=attention.scale, threshold=threshold).numpy()


@pytest.mark.parametrize("block", [0, 3])
def test_a_capture_is_the_predictors_mask_of_every_head_and_image(model, images, block):
    masks = capture_masks(model, images, threshold=0.005)
    layer = masks[LAYERS[block]]
    expected = expected_mask(model, images, block, 0.005)
    assert layer.shape == expected.shape == (CHUNK + 2, 2, 196, 196)
    # The batch is cut into chunks here and not there: a score at the threshold may fall on the other side.
    assert (layer.kept != expected).mean() < 1e-4
    assert layer.density == pytest.approx(tuple(expected.mean((0, 2, 3))), rel=1e-2)
    assert masks.source == "captured: VisionTransformer, 10 images, predicted probability at least 0.005"
    assert not masks.synthetic


def test_density_is_reached_over_the_whole_model_and_not_in_each_head(captured):
    assert captured.density == pytest.approx(0.2, rel=1e-3)
    assert list(captured.layers) == LAYERS
    densities = [density for layer in captured.layers.values() for density in layer.density]
    assert max(densities) > 1.3 * min(densities)
    assert captured.source.startswith("captured: VisionTransformer, 10 images, density 0.2, predicted probability at")


def test_the_threshold_it_states_gives_the_same_masks(model, images, captured):
    threshold = float(captured.source.rpartition(" ")[2])
    again = capture_masks(model, images, threshold=threshold)
    for name in LAYERS:
        assert (again[name].kept != captured[name].kept).mean() < 5e-3  # it is stated with three digits


def test_threshold_0_keeps_everything(model, images):
    assert capture_masks(model, images[:1], threshold=0).density == 1


def test_trained_attention_packs_better_than_noise(captured):
    """Trained heads share keys; were the mask noise, capturing it would be a waste of time."""
    mask = captured[LAYERS[-1]].kept
    noise = np.random.default_rng(0).random(mask.shape) < mask.mean()
    assert polarise(mask).global_tokens.mean() > polarise(noise).global_tokens.mean() + 5
    assert load_balance(mask, 64, 16) != pytest.approx(load_balance(noise, 64, 16), rel=0.02)


def test_the_model_is_left_as_it_was(images):
    model = VisionTransformer(img_size=28, patch_size=7, in_chans=1, embed_dim=16, num_heads=2, depth=1).train()
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    kind = type(model.blocks[0].attn)
    assert list(capture_masks(model, images[:1], threshold=0.1).layers) == ["blocks.0.attn"]
    assert (type(model.blocks[0].attn), model.training, calls) == (kind, True, [])
    assert not hasattr(model, "_vitrify")


def test_attention_that_convert_refuses_is_named():
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.attn \(timm\.models\.xcit\.XCA\) cannot be observed"):
        capture_masks(timm.create_model("xcit_nano_12_p16_224"), torch.randn(1, 3, 224, 224), density=0.2)


@pytest.mark.parametrize("name", ["levit_128s", "pvt_v2_b0", "mobilevit_xxs"])
@pytest.mark.slow
def test_other_families(name):
    model = timm.create_model(name)
    size = (3, 256, 256) if name == "mobilevit_xxs" else (3, 224, 224)
    masks = capture_masks(model, torch.randn(1, *size), density=0.2)
    scores = {op.module: op for op in vitrify.workload(model, size).operations if op.step == "qk" and op.macs}
    assert set(masks.layers) == set(scores)
    for module, op in scores.items():
        images, heads, queries, keys = masks[module].shape
        assert (images * heads, queries, keys) == (op.count, op.m, op.n)


def test_files_hold_them_whole(tmp_path, captured):
    path = tmp_path / "new" / "masks.npz"
    captured.save(path)
    assert list(path.parent.iterdir()) == [path]
    loaded = Masks.load(path)
    assert loaded.source == captured.source
    assert list(loaded.layers) == LAYERS
    for name in LAYERS:
        assert (loaded[name].kept == captured[name].kept).all()
    entries = sum(np.prod(layer.shape) for layer in captured.layers.values())
    assert path.stat().st_size < entries / 8
    before = path.read_bytes()
    captured.save(path)
    assert path.read_bytes() == before


def test_files_that_hold_no_masks(tmp_path, captured):
    with pytest.raises(InputError, match=r"masks are saved as .npz, not '.*masks.json'"):
        captured.save(tmp_path / "masks.json")
    with pytest.raises(InputError, match=r"masks '.*gone.npz' do not exist"):
        Masks.load(tmp_path / "gone.npz")
    for content in (b"", b"text", b"PK\x03\x04"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"bad.npz' holds no masks that vitrify saved"):
            Masks.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(InputError, match=r"other.npz' holds no masks that vitrify saved"):
        Masks.load(tmp_path / "other.npz")
    np.savez(tmp_path / "pickle.npz", header=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match=r"pickle.npz' holds no masks that vitrify saved"):
        Masks.load(tmp_path / "pickle.npz")


def test_a_layer_that_has_no_mask_is_named(captured):
    with pytest.raises(InputError, match=r"unknown attention module in the masks 'blocks\.9\.attn': did you mean"):
        captured["blocks.9.attn"]


@pytest.mark.parametrize("keys", [1, 7, 8, 197])
def test_packing_to_bits_and_back(keys):
    kept = np.random.default_rng(keys).random((2, 3, 5, keys)) < 0.5
    layer = LayerMask.of(kept)
    assert layer.shape == kept.shape
    assert (layer.kept == kept).all()
    assert layer.density == pytest.approx(tuple(kept.mean((0, 2, 3))))


@pytest.mark.parametrize("density", [1 / 197, 0.05, 0.25, 1])
@pytest.mark.parametrize("heads", [1, 3, 12])
def test_synthetic_masks_have_their_density_and_every_querys_own_token(density, heads):
    masks = synthetic_masks(["a", "b"], heads, 197, density, seed=1)
    assert masks.density == pytest.approx(density, rel=5e-3)
    for layer in masks.layers.values():
        assert layer.shape == (1, heads, 197, 197)
        assert layer.kept[..., range(197), range(197)].all()
    assert masks.synthetic
    assert masks.source.startswith("synthetic")


def test_synthetic_masks_follow_their_seed_and_have_structure():
    first, again, other = (synthetic_masks(["a"], 12, 197, 0.1, seed)["a"].kept for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    noise = np.random.default_rng(0).random(first.shape) < 0.1
    assert polarise(noise).global_tokens.sum() == 0
    assert polarise(first).global_tokens.sum() > 12
    near = np.abs(np.subtract.outer(range(197), range(197))) <= 1
    assert first[..., near].mean() > 2 * first.mean()


def test_synthetic_masks_balance_as_captured_ones_do(captured):
    """Within a third, at the same density: else they are no stand-in."""
    synthetic = synthetic_masks(LAYERS, 2, 196, captured.density, seed=0)
    real, stand_in = (np.mean([load_balance(m[n].kept, 64, 16) for n in LAYERS]) for m in (captured, synthetic))
    assert stand_in == pytest.approx(real, rel=1 / 3)


def test_synthetic_masks_for_a_workload_fit_its_attention():
    graph = vitrify.workload(timm.create_model("levit_128s"))
    masks = synthetic_for(graph, 0.25)
    scores = {op.module: op for op in graph.operations if op.step == "qk" and op.macs}
    assert {name: layer.shape for name, layer in masks.layers.items()} == {
        name: (1, op.count, op.m, op.n) for name, op in scores.items()
    }
    batch = vitrify.workload(VisionTransformer(img_size=32, patch_size=8, embed_dim=16, num_heads=2), (3, 32, 32), 4)
    assert synthetic_for(batch, 0.25)["blocks.0.attn"].shape == (1, 2, 17, 17)


class Unknown(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either the threshold"),
        ({"threshold": 0.1, "density": 0.1}, "either the threshold"),
        ({"threshold": 1.5}, "threshold must be a probability, not 1.5"),
        ({"density": 0}, "density must be a share above 0"),
        ({"density": 1.1}, "density must be a share above 0"),
    ],
)
def test_bad_arguments(model, images, arguments, message):
    with pytest.raises(InputError, match=message):
        capture_masks(model, images, **arguments)


def test_bad_input(model, images):
    with pytest.raises(InputError, match=r"images must be \(N, channels, height, width\), not \(1, 28, 28\)"):
        capture_masks(model, images[0], density=0.1)
    with pytest.raises(InputError, match=r"the model does not take images of \(3, 28, 28\)"):
        capture_masks(model, images.expand(-1, 3, -1, -1), density=0.1)
    with pytest.raises(UnsupportedError, match="Unknown has no attention that vitrify knows"):
        capture_masks(Unknown(), images, density=0.1)
    with pytest.raises(InputError, match=r"density must be at least 0.005076.*not 0.001"):
        synthetic_masks(["a"], 3, 197, 0.001)
    with pytest.raises(InputError, match="at most 1, not 2"):
        synthetic_masks(["a"], 3, 197, 2)
    converted = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, num_heads=2, depth=1)
    vitrify.convert_(converted, vitrify.recipes.taylor())
    with pytest.raises(UnsupportedError, match="has no softmax attention to mask"):
        synthetic_for(vitrify.workload(converted, (3, 32, 32)), 0.25)
