"""The feature extractor: a residual network with a decoder and skip connections, on each source image by itself.

GNT (ICLR 2023), appendix A, takes IBRNet's: the first three stages of a ResNet-34 with instance norm, and two steps up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride, bias=False)
        self.norm1 = _norm(outputs)
        self.conv2 = _convolution(outputs, outputs, 3, 1, bias=False)
        self.norm2 = _norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), _norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        out = F.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class UpBlock(nn.Module):
    """Double the map, convolve, join it with the encoder's map of that size, and convolve again."""

    def __init__(self, inputs: int, skipped: int, middle: int, outputs: int) -> None:
        super().__init__()
        self.up = _convolution(inputs, middle, 3, 1)
        self.up_norm = _norm(middle)
        self.join = _convolution(skipped + middle, outputs, 3, 1)
        self.join_norm = _norm(outputs)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x (N, inputs, h, w), skip (N, skipped, H, W) -> (N, outputs, 2 h, 2 w).

        A skip that is smaller, since it was halved with a remainder, is padded: as the released weights expect it.
        """
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        x = F.elu(self.up_norm(self.up(x)))
        height, width = x.shape[-2] - skip.shape[-2], x.shape[-1] - skip.shape[-1]
        skip = F.pad(skip, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.elu(self.join_norm(self.join(torch.cat([x, skip], 1))))


class FeatureNet(nn.Module):
    """Images (N, 3, H, W) in [0, 1] -> features (N, outputs, H / s, W / s), s = product of the first two strides.

    Sides that 4 s does not divide give maps a little larger than that.

    channels  of the three stages; the stem has as many as the first
    blocks    residual blocks of each stage
    strides   of the stem and the first stage; those of the others are 2
    outputs   feature channels

    Raises InputError for images with a side that the strides leave fewer than 2 pixels.
    """

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], strides: tuple[int, int], outputs: int) -> None:
        super().__init__()
        self.stem = _convolution(3, channels[0], 7, strides[0], bias=False)
        self.stem_norm = _norm(channels[0])
        steps = (strides[1], 2, 2)
        inputs = (channels[0], *channels[:2])
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(before if i == 0 else after, after, step if i == 0 else 1) for i in range(n)))
            for before, after, step, n in zip(inputs, channels, steps, blocks, strict=True)
        )
        self.up1 = UpBlock(channels[2], channels[1], channels[1], channels[1])
        self.up2 = UpBlock(channels[1], channels[0], channels[0], outputs)
        self.out = nn.Conv2d(outputs, outputs, 1)
        self._smallest = 2 * strides[0] * strides[1] * 4

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        if min(images.shape[-2:]) < self._smallest:
            raise InputError(
                f"source images of {images.shape[-1]} x {images.shape[-2]} pixels are too small for this feature "
                f"extractor: both sides must be at least {self._smallest}"
            )
        x = F.relu(self.stem_norm(self.stem(images)))
        first = self.stages[0](x)
        second = self.stages[1](first)
        third = self.stages[2](second)
        features: Tensor = self.out(self.up2(self.up1(third, second), first))
        return features


def _convolution(inputs: int, outputs: int, kernel: int, stride: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias, padding_mode="reflect")


def _norm(channels: int) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(channels, affine=True)
