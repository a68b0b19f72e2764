"""Pictures as files: PNG, depth and error maps, animations. Tensors are (3, H, W) float32 in [0, 1]."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrify.errors import InputError
from vitrify.nvs.scene import Scene

ERROR_SCALE = 0.25
"""The mean absolute error of a pixel that is drawn white."""
_GIF_SIDE = 288


def error_map(picture: Tensor, truth: Tensor) -> Tensor:
    """Return (3, H, W): the mean absolute error of each pixel, from black by red and yellow to white (0.25 or more)."""
    error = (picture - truth).abs().mean(0) / ERROR_SCALE
    return torch.stack([(3 * error - shift).clamp(0, 1) for shift in (0, 1, 2)])


def depth_map(depth: Tensor, scene: Scene) -> Tensor:
    """Return (H, W) in [0, 1]: inverse depth, 1 at the scene's `near` and 0 at its `far`; 0 where depth is 0."""
    near, far = 1 / scene.near, 1 / scene.far
    inverse = torch.where(depth > 0, 1 / depth.clamp(min=1e-6), torch.tensor(far))
    return ((inverse - far) / (near - far)).clamp(0, 1)


def png(picture: Tensor) -> bytes:
    """Return a PNG: 8-bit RGB of (3, H, W), 16-bit grey of (H, W); values from 0 to 1."""
    if picture.ndim == 3:
        return _encode(Image.fromarray(_bytes(picture)), "PNG", optimize=True)
    return _encode(Image.fromarray((picture * 0xFFFF).round().numpy().astype(np.uint16)), "PNG")


def read_png(file: Path) -> Tensor:
    """Return what `png` wrote: (3, H, W), or (H, W) of 16-bit grey. Raises InputError where it cannot be read."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(image)
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files.
        raise InputError(f"cannot read {file}: {error}") from error
    if pixels.ndim == 2:
        return torch.from_numpy(pixels.astype(np.float32) / 0xFFFF)
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def gif(pictures: Sequence[Tensor], frames_per_second: float = 12.0) -> bytes:
    """Return an endless animation; small pictures are enlarged by a whole number to about 288 pixels in height."""
    factor = max(1, _GIF_SIDE // pictures[0].shape[1])
    frames = [Image.fromarray(_bytes(picture).repeat(factor, 0).repeat(factor, 1)) for picture in pictures]
    duration = round(1000 / frames_per_second)
    return _encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)


def side_by_side(*pictures: Tensor) -> Tensor:
    """Return pictures of one height in a row; those of (H, W) are made grey."""
    return torch.cat([picture if picture.ndim == 3 else picture.expand(3, -1, -1) for picture in pictures], 2)


def _bytes(picture: Tensor) -> NDArray[np.uint8]:
    return (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
