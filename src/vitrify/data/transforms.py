"""From PIL images to normalised tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose, Grayscale
from torchvision.transforms.functional import pil_to_tensor

from vitrify.errors import InputError, unknown

Augment = Literal["none", "light", "rand"]
AUGMENTS = ("none", "light", "rand")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def build_transform(
    input_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    train: bool,
    augment: Augment = "light",
    interpolation: str = "bicubic",
    crop_pct: float = 1.0,
) -> Callable[[Image.Image], Tensor]:
    """Build the transform of a PIL image (any mode, any size) to a float32 tensor of shape `input_size`.

    Without `train`, or with `augment="none"`, it is timm's evaluation transform: the shorter side is resized to
    size / crop_pct, the centre is cut out, the values are divided by 255 and normalised. The arguments are those that
    timm's `resolve_model_data_config(model)` gives.

    Args:
        input_size: (channels, height, width) in pixels; channels 1 (colour images become grey) or 3 (grey ones are
            repeated).
        mean: per channel, or one number for all, on the scale 0 to 1. std: likewise.
        train: whether to augment.
        augment: "light": a random shift (the image, padded with black by 1/14 of its size, 2 pixels at 28, is cropped
            anywhere) and a horizontal flip; cheap. "rand": timm's random resized crop, flip, RandAugment 9/0.5 and
            random erasing 0.25, DeiT's recipe.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos".
        crop_pct: share of the resized image that the centre crop keeps, in (0, 1].

    Raises:
        InputError: names the argument, and what it may be.
    """
    channels, height, width = _check_input_size(input_size)
    mean, std = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if augment not in AUGMENTS:
        raise unknown("augment", augment, AUGMENTS)
    if interpolation not in _RESAMPLING:
        raise unknown("interpolation", interpolation, _RESAMPLING)
    if min(std) <= 0:
        raise InputError(f"std must be positive, not {std}")
    if not 0 < crop_pct <= 1:
        raise InputError(f"crop_pct must be in (0, 1], not {crop_pct}")
    size = (height, width)
    if train and augment == "light":
        return _Light(channels, size, mean, std, interpolation)
    if train and augment == "rand":
        return _rand(channels, size, mean, std, interpolation)
    to_tensor = create_transform(
        (channels, height, width), mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct
    )
    return Compose([_to_grey if channels == 1 else _to_rgb, to_tensor])  # type: ignore[no-any-return]  # untyped


class _Light:
    """Resize, random shift, random flip, normalise: on tensors, with few calls, since small images cost little else."""

    def __init__(
        self, channels: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], interpolation: str
    ) -> None:
        self.convert = _to_grey if channels == 1 else _to_rgb
        self.size = size
        self.resample = _RESAMPLING[interpolation]
        # (x / 255 - mean) / std as one multiplication and one addition.
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self.offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = pil_to_tensor(self._cover(self.convert(image)))
        height, width = self.size
        pad_y, pad_x = (max(1, round(side / 14)) for side in self.size)
        pixels = F.pad(pixels, (pad_x, pad_x, pad_y, pad_y))
        draw_y, draw_x, draw_flip = torch.rand(3).tolist()
        top = int(draw_y * (pixels.shape[1] - height + 1))
        left = int(draw_x * (pixels.shape[2] - width + 1))
        pixels = pixels[:, top : top + height, left : left + width]
        if draw_flip < 0.5:
            pixels = pixels.flip(-1)
        return torch.addcmul(self.offset, pixels, self.scale)

    def _cover(self, image: Image.Image) -> Image.Image:
        """Resize, keeping proportions, until the image just covers `size`."""
        height, width = self.size
        factor = max(height / image.height, width / image.width)
        new_size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
        return image if new_size == image.size else image.resize(new_size, self.resample)


def _rand(
    channels: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float], interpolation: str
) -> Callable[[Image.Image], Tensor]:
    # RandAugment's colour operations need RGB, so a one-channel model's images are grey RGB up to the last step.
    to_three = 3 // channels
    geometry, augmentation, to_tensor = create_transform(
        (3, *size),
        is_training=True,
        auto_augment="rand-m9-mstd0.5-inc1",
        re_prob=0.25,
        re_mode="pixel",
        interpolation=interpolation,
        mean=tuple(mean) * to_three,
        std=tuple(std) * to_three,
        separate=True,
    )
    for op in (op for policy in augmentation.transforms for op in policy.ops):
        # At the full magnitude of 10 timm posterizes to 0 bits, which Pillow 13 refuses (older versions gave a black
        # image).
        op.magnitude_max = 9.99
    steps = [_to_rgb, geometry, augmentation, to_tensor]
    if channels == 1:
        steps = [_to_rgb, geometry, augmentation, Grayscale(3), to_tensor, _first_channel]
    return Compose(steps)  # type: ignore[no-any-return]  # torchvision is untyped


def _to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    return image if image.mode == "L" else image.convert("L")


def _first_channel(pixels: Tensor) -> Tensor:
    return pixels[:1]


def _check_input_size(input_size: Sequence[int]) -> tuple[int, int, int]:
    sizes: tuple[Any, ...] = tuple(input_size)
    if len(sizes) != 3 or sizes[0] not in (1, 3) or min(sizes) < 1:
        raise InputError(f"input_size must be (1 or 3 channels, height, width), not {sizes}")
    return sizes


def _per_channel(name: str, values: Sequence[float], channels: int) -> Sequence[float]:
    if len(values) not in (1, channels):
        raise InputError(f"{name} must hold 1 or {channels} numbers for {channels} channel(s), not {tuple(values)}")
    return tuple(values) * (channels // len(values))
