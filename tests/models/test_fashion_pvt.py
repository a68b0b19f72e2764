"""`pvt_mini_56`: its shape, and that it trains, saves and converts through the command line."""

import pytest
import timm
import torch

import vitrify.models  # noqa: F401  # registers the model
from vitrify.artefact import create_model, input_config, load, save
from vitrify.cli import main
from vitrify.convert import AttentionSpec, Recipe, convert_
from vitrify.data import build_transform, load_dataset
from vitrify.data.fashion import CLASSES


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def create(**changes):
    torch.manual_seed(0)
    return create_model("pvt_mini_56", **changes).eval()


def test_two_stages_of_196_and_49_tokens_with_49_keys_each():
    model, seen = create(), {}
    for name, module in model.named_modules():
        if name.endswith(("attn.q", "attn.kv")):
            module.register_forward_hook(lambda *args, name=name: seen.update({name: tuple(args[2].shape[1:])}))
    assert model(torch.zeros(1, 1, 56, 56)).shape == (1, 10)
    expected = {f"stages.0.blocks.{i}.attn.{p}": s for i in (0, 1) for p, s in (("q", (196, 48)), ("kv", (49, 96)))}
    expected |= {f"stages.1.blocks.{i}.attn.{p}": s for i in (0, 1) for p, s in (("q", (49, 96)), ("kv", (49, 192)))}
    assert seen == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == 355_978


def test_shipped_images_are_enlarged_and_standardised():
    model = create()
    transform = build_transform(**input_config(model), train=False)
    data = load_dataset("fashion-mnist:shipped", "test", transform=transform)
    images = torch.stack([data[i][0] for i in range(0, 1000, 20)])
    assert images.shape[1:] == (1, 56, 56)
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1
    assert model.pretrained_cfg["label_names"] == CLASSES


def test_features_only_and_other_sizes():
    features = timm.create_model("pvt_mini_56", features_only=True)(torch.zeros(1, 1, 56, 56))
    assert [tuple(feature.shape) for feature in features] == [(1, 48, 14, 14), (1, 96, 7, 7)]
    assert create(num_classes=3, in_chans=3)(torch.zeros(1, 3, 40, 72)).shape == (1, 3)


def test_taylor_multiplies_less_in_both_stages_and_survives_a_save(tmp_path):
    model, images = create(), torch.randn(2, 1, 56, 56)
    before = model(images)
    conversion = convert_(model, Recipe(attention=AttentionSpec(core="taylor")))
    assert [change.name for change in conversion.changed] == [
        f"stages.{s}.blocks.{i}.attn" for s in (0, 1) for i in (0, 1)
    ]
    assert not torch.equal(model(images), before)
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").eval()(images), model(images))


def test_finetune_trains_it_and_writes_an_artefact(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the command sets it, and here it must not outlive the test
    options = ["--recipe", "softmax", "--data", "fashion-mnist:shipped", "--max-steps", "5", "--batch-size", "8"]
    assert main(["finetune", "pvt_mini_56", *options, "--output", str(tmp_path / "run")]) == 0
    model = load(tmp_path / "run" / "model")
    assert model.pretrained_cfg["input_size"] == (1, 56, 56)
    fresh = dict(create_model("pvt_mini_56").named_parameters())
    moved = {name for name, p in model.named_parameters() if p.ndim == 1 and not torch.equal(p, fresh[name])}
    # Norms and biases start at 1 and 0 in every model, so what differs was trained.
    assert "stages.0.blocks.0.attn.norm.weight" in moved
    assert "stages.1.blocks.1.mlp.fc2.bias" in moved
