"""Read one image file, whatever its mode, into 8-bit grey or RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vitrify.errors import InputError

_GREY_MODES = {"1", "L", "LA"}


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file: mode L for grey files, RGB for all others; turned upright where EXIF says how it was held.

    16-bit grey is scaled to 8 bits (Pillow's own conversion would clip it to white). Transparency is dropped, as
    torchvision and timm do.

    Raises:
        InputError: the file is missing, truncated, not an image, or holds pixels without a known range (floats,
            32-bit).
    """
    try:
        with Image.open(path) as file:
            file.load()
            return _to_eight_bits(ImageOps.exif_transpose(file))
    except (
        Exception
    ) as error:  # Pillow's plug-ins raise nearly anything on damaged files: SyntaxError, struct.error, ...
        raise InputError(f"cannot read image {path}: {type(error).__name__}: {error}") from error


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"grey values from {values.min()} to {values.max()}; at most 16 bits can be scaled to 8")
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; save them as 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # silences Pillow's advice to do so
    return image.convert("L" if image.mode in _GREY_MODES else "RGB")
