import pytest
import timm
import torch
from safetensors.torch import load_file

from vitrify.data import build_transform, load_dataset
from vitrify.data.fashion import CLASSES
from vitrify.errors import UnsupportedError
from vitrify.models.fashion_vit import WEIGHTS


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def create(pretrained=True, **kwargs):
    return timm.create_model("vit_mini_patch2_28", pretrained=pretrained, **kwargs).eval()


def test_packaged_weights_load_unchanged_and_are_small():
    stored = load_file(WEIGHTS)
    state = create().state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    assert WEIGHTS.stat().st_size < 3e6


def test_packaged_weights_classify_the_shipped_images():
    model = create()
    config = timm.data.resolve_model_data_config(model)
    transform = build_transform(config["input_size"], config["mean"], config["std"], train=False)
    data = load_dataset("fashion-mnist:shipped", "test", transform=transform)
    images, labels = zip(*(data[i] for i in range(0, 1000, 4)), strict=True)
    with torch.inference_mode():
        predicted = model(torch.stack(images)).argmax(1)
    assert (predicted == torch.tensor(labels)).float().mean() > 0.85
    assert model.pretrained_cfg["label_names"] == CLASSES == tuple(data.classes)


def test_patches_of_two_make_196_tokens():
    model = create(pretrained=False)
    assert model.forward_features(torch.zeros(1, 1, 28, 28)).shape == (1, 196, 64)


@pytest.mark.parametrize(
    ("kwargs", "image", "output"),
    [
        ({"img_size": 56}, (1, 56, 56), (2, 10)),
        ({"dynamic_img_size": True}, (1, 40, 56), (2, 10)),
        ({"dynamic_img_pad": True}, (1, 28, 28), (2, 10)),
        ({"num_classes": 0}, (1, 28, 28), (2, 64)),
        ({"num_classes": 3}, (1, 28, 28), (2, 3)),
    ],
)
def test_arguments_of_timm_keep_working(kwargs, image, output):
    assert create(**kwargs)(torch.zeros(2, *image)).shape == output


def test_position_embedding_is_resampled_for_another_size():
    small, large = create().pos_embed, create(img_size=56).pos_embed
    grid = large.view(28, 28, 64)
    back = torch.nn.functional.avg_pool2d(grid.permute(2, 0, 1), 2).flatten(1).T
    assert torch.nn.functional.cosine_similarity(back, small[0]).mean() > 0.9


def test_colour_input_with_equal_channels_gives_the_grey_result():
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(create(in_chans=3)(x.expand(-1, 3, -1, -1)), create()(x), rtol=1e-4, atol=1e-5)


def test_dynamic_size_equals_static_at_the_native_size():
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(create(dynamic_img_size=True)(x), create()(x))


def test_features_only():
    shapes = [tuple(feature.shape) for feature in create(features_only=True)(torch.zeros(1, 1, 28, 28))]
    assert shapes == [(1, 64, 14, 14)] * 3


def test_set_input_size_changes_the_grid_but_never_the_patch():
    model = create()
    model.set_input_size((32, 28))
    assert model(torch.zeros(1, 1, 32, 28)).shape == (1, 10)
    with pytest.raises(UnsupportedError, match="must be 2, not 4"):
        model.set_input_size(patch_size=4)
    with pytest.raises(UnsupportedError, match="must be 2"):
        create(pretrained=False, patch_size=4)
