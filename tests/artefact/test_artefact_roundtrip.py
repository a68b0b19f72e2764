"""save and load: the same bits in a new process, for every way a model can come about."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import nn

import vitrify
import vitrify.models
from vitrify import Recipe, convert_, create_model, load, recipes, save
from vitrify.artefact import input_config, is_artefact, rebuild_original

torch.set_num_threads(1)

CONVOLVED = Recipe("convolved", {"core": "taylor_sparse", "threshold": 0.3, "value_conv": 3})


def randomised(model: nn.Module) -> nn.Module:
    """Fresh models hold zeros and ones, which hide a tensor that was lost."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.01)
    return model


def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model.eval()(images)
    return result if isinstance(result, torch.Tensor) else result.last_hidden_state


def assert_round_trip(model: nn.Module, folder, images: torch.Tensor) -> nn.Module:
    randomised(model)
    expected = outputs(model, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(model, folder)
    loaded = load(folder)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert loaded.state_dict()[name].dtype == tensor.dtype
    assert torch.equal(outputs(loaded, images), expected)
    return loaded


READ_BACK = """
import sys, torch, vitrify
torch.set_num_threads(1)
model = vitrify.load(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_bit_for_bit_in_a_new_process(tmp_path):
    model = randomised(create_model("vit_mini_patch2_28"))
    convert_(model, CONVOLVED)
    nn.init.normal_(next(model.blocks[0].attn.value_conv.parameters()))  # it starts at zero
    images = torch.randn(2, 1, 28, 28)
    torch.save(images, tmp_path / "images.pt")
    save(model, tmp_path / "artefact")
    script = [sys.executable, "-c", READ_BACK, *(str(tmp_path / n) for n in ("artefact", "images.pt", "out.pt"))]
    subprocess.run(script, check=True, env=os.environ)
    assert torch.equal(torch.load(tmp_path / "out.pt"), outputs(model, images))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_mini_patch2_28", {"num_classes": 3, "img_size": 32, "in_chans": 3}),
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 64, "num_heads": 2, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": (48, 32), "dynamic_img_size": True, "num_classes": 0}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1}),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1, "img_size": 56}),
        ("pvt_v2_b0", {"num_classes": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_models_built_with_timm_alone(tmp_path, name, arguments):
    """The arguments are read back from the model, which nobody annotated."""
    model = timm.create_model(name, **arguments)
    size = input_config(model)["input_size"]
    convert_(model, Recipe("all", "taylor", keep_if_costlier=False), input_size=size)
    loaded = assert_round_trip(model, tmp_path / "artefact", torch.randn(1, *size))
    assert [c.name for c in loaded._vitrify.changed] == [c.name for c in model._vitrify.changed] != []


def test_a_head_replaced_after_building(tmp_path):
    model = create_model("vit_mini_patch2_28", num_classes=7)
    model.reset_classifier(5)
    assert assert_round_trip(model, tmp_path / "a", torch.randn(1, 1, 28, 28)).num_classes == 5


def test_unconverted_model_has_no_recipe(tmp_path):
    loaded = assert_round_trip(create_model("vit_mini_patch2_28"), tmp_path / "a", torch.randn(1, 1, 28, 28))
    assert not hasattr(loaded, "_vitrify")
    assert json.loads((tmp_path / "a" / "recipe.json").read_text()) is None


def test_partial_conversion_comes_back_as_it_was(tmp_path):
    """filter_fn is code and cannot be stored; what it decided can."""
    model = create_model("vit_mini_patch2_28")
    convert_(model, recipes.vitality(), lambda _, name: name.startswith("blocks.1"))
    loaded = assert_round_trip(model, tmp_path / "a", torch.randn(1, 1, 28, 28))
    assert [c.name for c in loaded._vitrify.changed] == ["blocks.1.attn"]
    assert loaded._vitrify.recipe == recipes.vitality()


@pytest.mark.filterwarnings("ignore:load will not keep these drop-out rates")
def test_the_reasons_come_back(tmp_path):
    """What was kept for its cost, filtered out or refused is still so after loading, and not 'left out by a filter'."""
    model = create_model("vit_mini_patch2_28")
    model.blocks[0].attn.attn_drop.p = 0.5
    recipe = Recipe("mine", "taylor", modules={"blocks.1.*": "softmax"})
    conversion = convert_(model, recipe, lambda _, name: "2" not in name)
    conversion.notes.append("a note")
    assert all((conversion.changed, conversion.kept, conversion.refused))
    save(model, tmp_path / "a")
    assert load(tmp_path / "a")._vitrify == conversion


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ({"attn_drop_rate": 0.5}, r"'blocks\.0\.attn\.attn_drop' 0\.5 \(then 0\)"),
        ({"drop_path_rate": 0.1}, r"'blocks\.1\.drop_path1' 0\.\d+ \(then 0\), .* and \d more"),
        ({"patch_drop_rate": 0.25}, r"'patch_drop' 0\.25 \(then 0\)"),
    ],
)
def test_drop_out_rates_that_load_cannot_know_are_said(tmp_path, rates, said):
    """timm does not keep them where they could be read back; create_model does."""
    model = timm.create_model("vit_mini_patch2_28", **rates)
    with pytest.warns(UserWarning, match=f"will not keep these drop-out rates.*{said}") as warned:
        save(model, tmp_path / "a")
    assert warned[0].filename == __file__
    assert load(tmp_path / "a").blocks[0].attn.attn_drop.p == 0
    kept = create_model("vit_mini_patch2_28", **rates)
    loaded = assert_round_trip(kept, tmp_path / "b", torch.randn(1, 1, 28, 28))
    assert loaded.blocks[0].attn.attn_drop.p == rates.get("attn_drop_rate", 0)


def test_a_model_given_back_its_softmax_for_the_cost_comes_back(tmp_path):
    model = create_model("vit_mini_patch2_28")
    convert_(model, Recipe("all", "taylor", keep_if_costlier=False))
    assert len(convert_(model, recipes.taylor(), input_size=(1, 28, 28)).changed) == 4
    model.set_input_size((8, 8))
    assert len(convert_(model, recipes.taylor(), input_size=(1, 8, 8)).kept) == 4
    assert_round_trip(model, tmp_path / "a", torch.randn(2, 1, 8, 8))


def test_two_conversions_in_a_row_both_come_back(tmp_path):
    model = create_model("vit_mini_patch2_28")
    convert_(model, recipes.taylor(), lambda _, name: name.startswith("blocks.0"))
    convert_(model, recipes.vitality(), lambda _, name: name.startswith("blocks.1"))
    loaded = assert_round_trip(model, tmp_path / "a", torch.randn(1, 1, 28, 28))
    assert type(loaded.blocks[0].attn.core) is type(model.blocks[0].attn.core)


def test_the_cost_rule_is_not_asked_again(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    convert_(model, recipes.taylor(), input_size=(3, 224, 224))
    assert len(model._vitrify.changed) == 1
    model.set_input_size((32, 32))  # at this size Taylor would not pay, and a new conversion would keep softmax
    loaded = assert_round_trip(model, tmp_path / "a", torch.randn(1, 3, 32, 32))
    assert len(loaded._vitrify.changed) == 1


def test_half_precision_is_kept(tmp_path):
    model = convert_and_return(create_model("vit_mini_patch2_28").to(torch.bfloat16))
    assert_round_trip(model, tmp_path / "a", torch.randn(1, 1, 28, 28, dtype=torch.bfloat16))


def convert_and_return(model: nn.Module) -> nn.Module:
    convert_(model, recipes.taylor())
    return model


def test_mixed_precision_is_kept(tmp_path):
    model = create_model("vit_mini_patch2_28")
    model.head.double()
    save(randomised(model), tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert loaded.head.weight.dtype == torch.float64
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert loaded.pos_embed.dtype == torch.float32


def test_shared_tensors_are_written_once(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model

    model = randomised(tied())
    with pytest.warns(UserWarning, match="model="):
        save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", model=tied())
    assert loaded[1].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight, model[0].weight)
    assert torch.equal(loaded[1].bias, model[1].bias)


def test_overlapping_views_are_saved(tmp_path):
    model = nn.Module()
    whole = torch.arange(6.0)
    model.register_buffer("whole", whole)
    model.register_buffer("part", whole[2:4])
    with pytest.warns(UserWarning, match="model="):
        save(model, tmp_path / "a")
    fresh = nn.Module()
    fresh.register_buffer("whole", torch.zeros(6))
    fresh.register_buffer("part", torch.zeros(2))
    assert torch.equal(load(tmp_path / "a", model=fresh).part, torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize("wrap", [nn.DataParallel, pytest.param(torch.compile, marks=pytest.mark.slow)])
def test_wrapped_model_is_saved_under_its_own_names(tmp_path, wrap):
    model = create_model("vit_mini_patch2_28")
    save(wrap(model), tmp_path / "a")
    assert load(tmp_path / "a").state_dict().keys() == model.state_dict().keys()


def test_non_persistent_state_is_left_out(tmp_path):
    model = create_model("vit_mini_patch2_28")
    convert_(model, recipes.vitality())
    save(model, tmp_path / "a")
    names = vitrify.artefact.read_checkpoint(tmp_path / "a" / "model.safetensors").keys()
    assert names == create_model("vit_mini_patch2_28").state_dict().keys()


def test_model_of_the_callers_own(tmp_path):
    """A class that no registry knows is saved, says so, and is loaded into a model that the caller builds."""
    arguments = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 2}
    model = timm.models.vision_transformer.VisionTransformer(**arguments)
    convert_(model, Recipe("all", "taylor", keep_if_costlier=False))
    with pytest.warns(UserWarning, match="not built by a registered timm name"):
        save(randomised(model), tmp_path / "a")
    with pytest.raises(vitrify.InputError, match="pass it, `vitrify"):
        load(tmp_path / "a")
    fresh = timm.models.vision_transformer.VisionTransformer(**arguments)
    loaded = load(tmp_path / "a", model=fresh)
    assert loaded is fresh
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(outputs(loaded, images), outputs(model, images))


def test_model_that_its_name_does_not_rebuild_is_not_passed_off_as_it(tmp_path):
    """Same names and shapes, another function: an epsilon."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    model.norm.eps = 0.1
    with pytest.warns(UserWarning, match="gives another model: 'norm'"):
        save(model, tmp_path / "a")


def test_replacing_an_artefact(tmp_path):
    first, second = (randomised(create_model("vit_mini_patch2_28", num_classes=n)) for n in (2, 3))
    save(first, tmp_path / "a")
    save(second, tmp_path / "a")
    assert load(tmp_path / "a").num_classes == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert is_artefact(tmp_path / "a")


def test_preprocessing_survives(tmp_path):
    model = create_model("vit_mini_patch2_28", img_size=32, in_chans=3)
    save(model, tmp_path / "a")
    config = input_config(load(tmp_path / "a"))
    assert config == input_config(model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == pytest.approx((0.286,) * 3)


@pytest.mark.parametrize("class_name", ["ViTModel", "DeiTModel", "Dinov2Model", "SiglipVisionModel"])
def test_hugging_face_models(tmp_path, class_name):
    transformers = pytest.importorskip("transformers")
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4
    )
    model = model_class(config)
    convert_(model, Recipe("all", "taylor", keep_if_costlier=False))
    assert_round_trip(model, tmp_path / "a", torch.randn(1, 3, 32, 32))
    assert input_config(load(tmp_path / "a"))["input_size"] == (3, 32, 32)


def test_hugging_face_folder_without_pooler(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=4
    )
    assert_round_trip(transformers.ViTModel(config, add_pooling_layer=False), tmp_path / "a", torch.randn(1, 3, 32, 32))
    source = randomised(transformers.ViTModel(config))
    source.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 1.0, 1.0]})
    )
    with pytest.raises(vitrify.InputError, match="field of ViTConfig 'hiden_size': did you mean 'hidden_size'"):
        create_model(f"hf:{tmp_path / 'hf'}", hiden_size=64)
    assert input_config(create_model(f"hf:{tmp_path / 'hf'}", img_size=48))["input_size"] == (3, 48, 48)
    model = create_model(f"hf:{tmp_path / 'hf'}", pretrained=True)
    assert torch.equal(model.layernorm.weight, source.layernorm.weight)
    loaded = assert_round_trip(model, tmp_path / "b", torch.randn(1, 3, 32, 32))
    assert input_config(loaded)["mean"] == (0.1, 0.2, 0.3)
    original = rebuild_original(loaded._vitrify_builder)
    assert torch.equal(original.layernorm.weight, source.layernorm.weight)
