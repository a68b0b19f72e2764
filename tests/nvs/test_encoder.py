"""The feature extractor: sizes, one image at a time, and images that are too small."""

import pytest
import torch

from vitrify.errors import InputError
from vitrify.nvs.encoder import FeatureNet


def encoder(strides=(2, 1)):
    torch.manual_seed(0)
    return FeatureNet((4, 6, 8), (1, 2, 1), strides, 5)


@pytest.mark.parametrize(
    ("strides", "size", "expected"),
    [
        ((2, 1), (24, 32), (12, 16)),
        ((2, 2), (32, 48), (8, 12)),
        ((1, 1), (16, 24), (16, 24)),
        ((2, 2), (36, 50), (12, 16)),
    ],
)
def test_maps_have_the_images_size_over_the_strides(strides, size, expected):
    assert encoder(strides)(torch.rand(2, 3, *size)).shape == (2, 5, *expected)


def test_images_do_not_see_one_another():
    net, images = encoder(), torch.rand(3, 3, 24, 32)
    together = net(images)
    for i in range(3):
        torch.testing.assert_close(net(images[i : i + 1])[0], together[i])


@pytest.mark.parametrize("mode", [True, False])
def test_brightness_and_mode_change_nothing_in_the_statistics(mode):
    net, images = encoder(), torch.rand(1, 3, 24, 32)
    torch.testing.assert_close(net.train(mode)(images), net.train(False)(images))


def test_images_too_small_are_refused():
    with pytest.raises(InputError, match=r"8 x 40 pixels are too small .* at least 16"):
        encoder()(torch.rand(1, 3, 40, 8))
    assert encoder()(torch.rand(1, 3, 16, 16)).shape == (1, 5, 8, 8)
