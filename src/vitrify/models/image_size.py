"""Which image sides a model can take."""

from __future__ import annotations

import math

from timm.layers import PatchEmbed
from torch import nn

from vitrify.errors import InputError
from vitrify.models import pvt_v1


def check_image_size(model: nn.Module, size: int, name: str) -> None:
    """Refuse an image side (pixels) that is no multiple of the patch side: pixels would be cut off in silence.

    name: what the caller calls the side, for the message of the InputError. Models whose patches overlap or are padded
    take any side, and so does a model whose patch embedding is not known here.
    """
    patch = _patch_side(model)
    if size % patch:
        below = size // patch * patch
        fitting = f"{below} or {below + patch}" if below else f"{patch}"
        raise InputError(f"{name} {size} is not a multiple of the model's patch side {patch}: take {fitting}")


def _patch_side(model: nn.Module) -> int:
    if isinstance(model, pvt_v1.PyramidVisionTransformer):
        # Each stage makes patches of the patches of the one before.
        return math.prod(m.proj.stride[0] for m in model.children() if isinstance(m, pvt_v1.PatchEmbed))
    stem = getattr(model, "patch_embed", None)
    if not isinstance(stem, PatchEmbed) or stem.dynamic_img_pad:
        return 1
    height, width = stem.patch_size
    return max(int(height), int(width))
