"""Checkpoints of other people: what is preferred, what is stripped, what is refused."""

import argparse
import os
import pickle
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitrify import InputError, create_model
from vitrify.artefact import load_weights, read_checkpoint, rebuild_original

torch.set_num_threads(1)

WEIGHTS = {"a.weight": torch.arange(3.0), "a.bias": torch.ones(1)}
OTHER = {name: tensor + 100 for name, tensor in WEIGHTS.items()}


def assert_weights(found):
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"model": WEIGHTS, "epoch": 3},
        {"state_dict": WEIGHTS, "model": OTHER},
        {"model_ema": WEIGHTS, "state_dict": OTHER},
        {"state_dict_ema": WEIGHTS, "model_ema": OTHER, "state_dict": OTHER, "model": OTHER},
        {"state_dict_ema": None, "state_dict": WEIGHTS},
        {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1)},
        {"state_dict": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in WEIGHTS.items()},
    ],
    ids=["bare", "model", "state_dict", "model_ema", "ema-first", "empty-ema", "timm-args", "ddp", "compiled-ddp"],
)
def test_where_the_weights_are(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    assert_weights(read_checkpoint(tmp_path / "c.pth"))


def test_a_name_that_only_some_keys_share_is_no_wrapper(tmp_path):
    content = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(content, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt").keys() == content.keys()


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "c.safetensors")
    assert_weights(read_checkpoint(tmp_path / "c.safetensors"))


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_is_refused_and_not_run(tmp_path, legacy):
    marker = tmp_path / "was-run"
    file = tmp_path / "evil.pth"
    torch.save({"state_dict": WEIGHTS, "extra": Malicious(marker)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="would run code"):
        read_checkpoint(file)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bare_pickle_is_refused(tmp_path):
    marker = tmp_path / "was-run"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(InputError, match="not a complete torch checkpoint"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not marker.exists()


def test_the_refusal_names_the_code(tmp_path):
    torch.save({"x": Malicious(tmp_path / "m")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="mkdir"):
        read_checkpoint(tmp_path / "evil.pth")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
def test_truncated(tmp_path, share):
    file = tmp_path / "c.pth"
    torch.save({"w": torch.randn(1000)}, file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(InputError, match="not a complete torch checkpoint"):
        read_checkpoint(file)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.pth")


def test_unknown_suffix(tmp_path):
    (tmp_path / "weights.h5").write_text("")
    with pytest.raises(InputError, match=r"expected \.safetensors or one of \.pth"):
        read_checkpoint(tmp_path / "weights.h5")


def test_no_tensors_inside(tmp_path):
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "c.pth")
    with pytest.raises(InputError, match="holds no state dict: found the keys epoch, lr"):
        read_checkpoint(tmp_path / "c.pth")


# --- into a model ---


def tiny(**arguments):
    return timm.create_model("vit_tiny_patch16_224", **{"depth": 1, "embed_dim": 32, "num_heads": 2, **arguments})


def test_position_embeddings_are_resampled():
    source, target = tiny(img_size=64), tiny(img_size=96)
    load_weights(target, source.state_dict(), "source")
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert target.pos_embed.shape[1] == 37
    assert torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])


@pytest.mark.parametrize("num_classes", [5, 0])
def test_another_number_of_classes_is_a_new_head_and_said(num_classes):
    source, target = tiny(), tiny(num_classes=num_classes)
    own = target.state_dict().get("head.weight", torch.zeros(0)).clone()
    with pytest.warns(UserWarning, match=r"classifier 'head' \(1000 classes\) was left out"):
        load_weights(target, source.state_dict(), "source")
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert torch.equal(target.state_dict().get("head.weight", torch.zeros(0)), own)


def test_no_classifier_is_a_new_head_and_said():
    source, target = tiny(num_classes=0), tiny(num_classes=5)
    own = target.head.weight.clone()
    with pytest.warns(UserWarning, match="no classifier 'head': the model's own is new"):
        assert load_weights(target, source.state_dict(), "source")
    assert torch.equal(target.norm.weight, source.norm.weight)
    assert torch.equal(target.head.weight, own)


def test_a_head_that_the_model_does_not_want_is_no_new_one():
    target = tiny(num_classes=0)
    with pytest.warns(UserWarning, match="left out"):
        assert not load_weights(target, tiny().state_dict(), "source")


def classifying(family, folder):
    """The folder of a Hugging Face config for 4 classes, and the encoder that its model stands on."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"image_size": 8, "patch_size": 4}
    if family == "Siglip":
        config = transformers.SiglipConfig(vision_config={**sizes, **images}, num_labels=4)
        encoder = transformers.SiglipVisionModel(config.vision_config)
    else:
        config = getattr(transformers, f"{family}Config")(**sizes, **images, num_labels=4)
        encoder = getattr(transformers, f"{family}Model")(config)
    config.architectures = [f"{family}ForImageClassification"]
    config.save_pretrained(folder)
    return f"hf:{folder}", encoder


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2", "Siglip"])
def test_a_hugging_face_encoders_weights_make_a_model_with_a_new_head(family, tmp_path):
    name, encoder = classifying(family, tmp_path)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    with pytest.warns(UserWarning, match="no classifier 'classifier': the model's own is new"):
        model = create_model(name, checkpoint=tmp_path / "encoder.safetensors")
    loaded = dict(model.named_children())[next(n for n, _ in model.named_children())].state_dict()
    assert loaded
    assert all(torch.equal(tensor, encoder.state_dict()[key]) for key, tensor in loaded.items())
    with pytest.raises(InputError, match="a new, random classifier, which is on record nowhere"):
        rebuild_original(model._vitrify_builder)


def test_a_hugging_face_classifier_of_other_classes_is_a_new_head(tmp_path):
    name, _ = classifying("ViT", tmp_path)
    source = create_model(name)
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    assert not create_model(name, checkpoint=tmp_path / "c.safetensors")._vitrify_builder["origin"]["new_head"]
    with pytest.warns(UserWarning, match=r"'classifier' \(4 classes\) was left out"):
        model = create_model(name, checkpoint=tmp_path / "c.safetensors", num_classes=3)
    assert model.classifier.out_features == 3
    assert torch.equal(model.vit.layernorm.weight, source.vit.layernorm.weight)
    assert model._vitrify_builder["origin"]["new_head"]


def test_a_hugging_face_folder_whose_weights_lack_the_head(tmp_path):
    name, encoder = classifying("ViT", tmp_path)
    save_file(encoder.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert create_model(name, pretrained=True)._vitrify_builder["origin"]["new_head"]
    create_model(name).save_pretrained(tmp_path)
    assert not create_model(name, pretrained=True)._vitrify_builder["origin"]["new_head"]


def test_foreign_weights_list_both_sides():
    with pytest.raises(InputError, match=r"o\.pth does not fit VisionTransformer: \d+ missing keys: .*2 unexpected"):
        load_weights(tiny(), WEIGHTS, "o.pth")


def test_a_checkpoint_that_fits_loads_without_a_word(tmp_path):
    source = create_model("vit_mini_patch2_28", num_classes=4)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "c.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model("vit_mini_patch2_28", num_classes=4, checkpoint=tmp_path / "c.pth")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in source.state_dict().items())
