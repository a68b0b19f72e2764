"""save and load of models whose linear layers shift, mix or hold codes: latent, packed, trained further."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vitrify import Recipe, convert_, create_model, load, pack_, recipes, save
from vitrify.errors import InputError
from vitrify.nn import Mixture, ShiftLinear, calibrate_codes_

torch.set_num_threads(1)

IMAGES = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def converted(name):
    model = create_model("vit_mini_patch2_28", pretrained=True, depth=1)
    convert_(model, recipes.get(name))
    if name == "shiftaddvit":
        calibrate_codes_(model, IMAGES)
    return model.eval()


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    # Of the shipped weights one block is enough; timm would refuse the rest of the checkpoint.
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)


@pytest.mark.parametrize("name", ["shiftaddvit", "vitrify"])
@pytest.mark.parametrize("packed", [False, True])
def test_round_trip(tmp_path, name, packed):
    model = converted(name)
    if packed:
        pack_(model)
    with torch.no_grad():
        expected = model(IMAGES)
        save(model, tmp_path / "a")
        loaded = load(tmp_path / "a")
        assert torch.equal(loaded(IMAGES), expected)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert loaded._vitrify.applied == model._vitrify.applied
    assert all(layer.packed is packed for layer in loaded.modules() if isinstance(layer, ShiftLinear))


def test_packed_codes_are_small(tmp_path):
    model = create_model("vit_mini_patch2_28", depth=1)
    convert_(model, Recipe("all", projections="shift", mlp="shift"))
    save(model, tmp_path / "latent")
    pack_(model)
    save(model, tmp_path / "packed")
    codes = load_file(tmp_path / "packed" / "model.safetensors")["blocks.0.mlp.fc1.codes"]
    assert (codes.dtype, codes.numel()) == (torch.uint8, 64 * 256 // 2)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("latent", "packed")]
    # The block's matrices shrink to an eighth; stem, positions and head stay as they are.
    assert sizes[0] - sizes[1] > 0.8 * 4 * (4 * 64 * 64 + 2 * 64 * 256)


def test_latencies_travel_with_the_artefact_and_not_in_the_recipe(tmp_path):
    model = converted("vitrify")
    model.blocks[0].mlp.set_alpha((2.0, 1.5))
    save(model, tmp_path / "a")
    assert load(tmp_path / "a").blocks[0].mlp.alpha == (2.0, 1.5)
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["conversion"]["resolved"]["modules"]["blocks.0.mlp"]["primitive"] == "mixture"
    routers = [m.router for m in load(tmp_path / "a").modules() if isinstance(m, Mixture)]
    assert torch.equal(routers[0].weight, model.blocks[0].mlp.router.weight)


def test_codes_that_do_not_fit_are_an_error(tmp_path):
    model = converted("vitrify")
    pack_(model)
    save(model, tmp_path / "a")
    other = create_model("vit_mini_patch2_28", depth=1, mlp_ratio=2)
    with pytest.raises(InputError, match=r"codes"):
        load(tmp_path / "a", other)


def test_a_part_converted_behind_the_models_back_is_refused(tmp_path):
    model = converted("vitrify")
    ShiftLinear.adopt_(model.head)
    model.head.linear_spec = model.blocks[0].attn.qkv.linear_spec
    with pytest.raises(InputError, match="head"):
        save(model, tmp_path / "a")
