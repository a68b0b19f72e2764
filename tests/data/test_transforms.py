import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from vitrify.data import build_transform
from vitrify.errors import InputError


def noise(height, width, mode="RGB"):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, *channels), dtype=np.uint8))


def plain(image, mean, std):
    pixels = torch.from_numpy(np.asarray(image).copy()).float().view(28, 28, -1).permute(2, 0, 1) / 255
    return (pixels - mean) / std


def test_evaluation_at_the_native_size_only_normalises():
    image = noise(28, 28, "L")
    transform = build_transform((1, 28, 28), (0.286,), (0.353,), train=False)
    assert_close(transform(image), plain(image, 0.286, 0.353))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize(("train", "augment"), [(False, "light"), (True, "none"), (True, "light"), (True, "rand")])
def test_any_image_becomes_the_input_size(channels, mode, train, augment):
    transform = build_transform((channels, 28, 40), [0.5], [0.25], train=train, augment=augment, crop_pct=0.9)
    for height, width in [(28, 40), (50, 33), (7, 90)]:
        tensor = transform(noise(height, width, mode))
        assert (tensor.shape, tensor.dtype) == ((channels, 28, 40), torch.float32)


def test_grey_image_repeats_over_three_channels():
    tensor = build_transform((3, 28, 28), (0.1, 0.2, 0.3), (1, 1, 1), train=False)(noise(28, 28, "L"))
    assert_close(tensor[0] + 0.1, tensor[2] + 0.3)


def test_light_is_a_shift_by_at_most_two_pixels_and_a_flip():
    image = noise(28, 28, "L")
    transform = build_transform((1, 28, 28), (0.286,), (0.353,), train=True)
    padded = torch.nn.functional.pad(torch.from_numpy(np.asarray(image).copy()), (2, 2, 2, 2)).float() / 255
    candidates = {}
    for top in range(5):
        for left in range(5):
            window = (padded[top : top + 28, left : left + 28] - 0.286) / 0.353
            candidates[top, left, False], candidates[top, left, True] = window, window.flip(-1)
    seen = set()
    torch.manual_seed(0)
    for _ in range(400):
        tensor = transform(image)[0]
        match = [key for key, window in candidates.items() if torch.allclose(tensor, window, atol=1e-5)]
        assert len(match) == 1
        seen.add(match[0])
    assert len(seen) >= 48  # of 50; all but certain at 400 draws


def test_light_at_a_size_that_needs_resizing_keeps_proportions():
    # Left half black, right half white: a squashed image would keep the edge in the middle of every crop's width.
    image = Image.fromarray(np.repeat(np.array([[0] * 300 + [255] * 300], np.uint8), 300, axis=0))
    transform = build_transform((1, 224, 224), (0.0,), (1.0,), train=True)
    torch.manual_seed(0)
    bright = [transform(image)[0, 112].mean().item() for _ in range(50)]
    assert min(bright) < 0.2
    assert max(bright) > 0.8


def test_rand_survives_every_operation_and_erases():
    # Among 600 draws RandAugment reaches its full magnitude, where timm asks Pillow to posterize to 0 bits.
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    transform = build_transform((1, 28, 28), (0.5,), (0.25,), train=True, augment="rand")
    outputs = torch.stack([transform(noise(28, 28, "L")) for _ in range(600)])
    assert outputs.isfinite().all()
    # Values beyond white and black (at +2 and -2) come only from the erased patches' normal noise.
    erased = (outputs.abs() > 2.001).flatten(1).any(1).float().mean()
    assert 0.1 < erased < 0.4


def test_transforms_travel_to_spawned_workers():
    for augment in ("none", "light", "rand"):
        pickle.loads(pickle.dumps(build_transform((1, 28, 28), (0.5,), (0.5,), train=True, augment=augment)))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"input_size": (2, 28, 28)}, r"input_size must be \(1 or 3 channels"),
        ({"input_size": (28, 28)}, "input_size must be"),
        ({"mean": (0.1, 0.2, 0.3)}, "mean must hold 1 or 1 numbers"),
        ({"std": ()}, "std must hold"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"augment": "lite"}, "unknown augment 'lite'"),
        ({"interpolation": "bicubik"}, "did you mean 'bicubic'"),
        ({"crop_pct": 0}, r"crop_pct must be in \(0, 1\], not 0"),
    ],
)
def test_bad_arguments_are_named(changes, complaint):
    arguments = {"input_size": (1, 28, 28), "mean": (0.5,), "std": (0.5,), "train": True} | changes
    with pytest.raises(InputError, match=complaint):
        build_transform(**arguments)
