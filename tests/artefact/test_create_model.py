"""create_model: names, arguments, and the way back to the original weights."""

import pytest
import torch

from vitrify import InputError, convert_, create_model, load, recipes, save
from vitrify.artefact import input_config, rebuild_original

torch.set_num_threads(1)


def test_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="unknown model 'deit_tiny_patch16_24': did you mean 'deit_tiny_patch16_224'"):
        create_model("deit_tiny_patch16_24")


def test_argument_that_the_model_does_not_take():
    with pytest.raises(InputError, match=r"cannot build 'vit_mini_patch2_28' with .*'image_size'"):
        create_model("vit_mini_patch2_28", image_size=32)


def test_pretrained_and_checkpoint_contradict(tmp_path):
    with pytest.raises(InputError, match="not both"):
        create_model("vit_mini_patch2_28", pretrained=True, checkpoint=tmp_path / "c.pth")


def test_no_pretrained_weights_exist():
    with pytest.raises(InputError, match="pretrained"):
        create_model("vit_mini_patch2_28.nosuchtag", pretrained=True)


def test_no_hugging_face_folder(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"expected a folder with config\.json"):
        create_model(f"hf:{tmp_path}")


def test_size_of_a_model_that_takes_any():
    """PVT has no img_size argument; the wish still decides what images it is given."""
    assert input_config(create_model("pvt_v2_b0", img_size=96))["input_size"] == (3, 96, 96)


def test_the_original_is_found_again(tmp_path):
    source = create_model("vit_mini_patch2_28", num_classes=4)
    torch.save(source.state_dict(), tmp_path / "c.pth")
    model = create_model("vit_mini_patch2_28", num_classes=4, checkpoint=tmp_path / "c.pth")
    convert_(model, recipes.taylor())
    torch.nn.init.zeros_(model.head.weight)  # as fine-tuning would
    save(model, tmp_path / "a")
    original = rebuild_original(load(tmp_path / "a")._vitrify_builder)
    assert not hasattr(original, "_vitrify")
    assert torch.equal(original.head.weight, source.head.weight)


def test_an_original_of_unknown_origin(tmp_path):
    save(create_model("vit_mini_patch2_28"), tmp_path / "a")
    with pytest.raises(InputError, match="not known where the original weights came from"):
        rebuild_original(load(tmp_path / "a")._vitrify_builder)
