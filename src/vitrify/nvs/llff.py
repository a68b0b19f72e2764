"""Scenes as LLFF has them: poses_bounds.npy beside a folder images/, in the order of the file names.

Mildenhall et al., "Local Light Field Fusion", SIGGRAPH 2019. A row has 17 numbers: a (3, 5) matrix row by row, whose
columns are the directions down, right and backward in the world, the camera's place, and (height, width, focal length
in pixels); then the nearest and farthest depth that the view shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vitrify.errors import InputError
from vitrify.nvs.scene import Scene, View, read_size

FILE = "poses_bounds.npy"
_ENDINGS = {".png", ".jpg", ".jpeg"}


def load_llff(folder: Path, shrink: int = 1) -> Scene:
    """Read the scene of a folder. Images are read when they are used.

    With `shrink` above 1, images_<shrink>/ is used where there is one, as LLFF makes it; else images/, averaged. Near
    and far are the extremes over all views. The focal length follows the images' size.

    Raises:
        InputError: a file is missing or damaged, there is not one pose for each image, images are not of the stated
            shape, or a view is not one (see `View`).
    """
    rows = _rows(folder / FILE)
    small = folder / f"images_{shrink}"
    images = small if shrink > 1 and small.is_dir() else folder / "images"
    if not images.is_dir():
        there = ", ".join(sorted(path.name for path in folder.glob("images_*"))) or "none"
        raise InputError(f"{folder} has no folder images/ (smaller copies that are there: {there})")
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in _ENDINGS)
    if len(files) != len(rows):
        raise InputError(f"{folder / FILE} has {len(rows)} poses, but {images} has {len(files)} images")
    views = [_view(file, row) for file, row in zip(files, rows, strict=True)]
    scene = Scene(folder.resolve().name, tuple(views), float(rows[:, 15].min()), float(rows[:, 16].max()))
    return scene if images == small else scene.shrunk(shrink)


def _rows(file: Path) -> NDArray[np.float64]:
    try:
        rows = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(rows, np.ndarray) or rows.shape[1:] != (17,) or not len(rows) or rows.dtype.kind not in "fiu":
        shape = f"{rows.shape} {rows.dtype}" if isinstance(rows, np.ndarray) else "an archive"
        raise InputError(f"{file} must be an array of numbers, (views, 17), not {shape}")
    return rows.astype(np.float64)


def _view(file: Path, row: NDArray[np.float64]) -> View:
    matrix = row[:15].reshape(3, 5)
    height, width, focal = matrix[:, 4]
    down, right, backward, place = matrix[:, :4].T
    pose = np.eye(4)
    pose[:3] = np.stack([right, down, -backward, place], 1)
    image_height, image_width = read_size(file.name, file)
    if not (height > 0 < width and abs(image_width - width * image_height / height) <= 1):
        raise InputError(
            f"{file} is {image_width} x {image_height} pixels, its pose is for {width:g} x {height:g}: another shape"
        )
    focal_x, focal_y = focal * image_width / width, focal * image_height / height
    intrinsics = [[focal_x, 0, image_width / 2], [0, focal_y, image_height / 2], [0, 0, 1]]
    return View(file.name, file, torch.tensor(intrinsics, dtype=torch.float32), torch.from_numpy(pose).float())
