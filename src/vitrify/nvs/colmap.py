"""Scenes that COLMAP reconstructed: images/ and a sparse model, text or binary.

Schoenberger and Frahm, "Structure-from-Motion Revisited", CVPR 2016. A model's poses are world to camera; axes and
pixel centres are those of `vitrify.nvs`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vitrify.errors import InputError, UnsupportedError
from vitrify.nvs.colmap_files import Camera, Photograph, read_model
from vitrify.nvs.scene import Scene, View, read_size

# A few points are always wrong: LLFF leaves the same shares out.
_PERCENTILES = (0.1, 99.9)


def find_model(folder: Path) -> Path | None:
    """Return where the model of a scene is: the folder itself, sparse/0 or sparse; None if nowhere."""
    for place in (folder, folder / "sparse" / "0", folder / "sparse"):
        if (place / "cameras.bin").is_file() or (place / "cameras.txt").is_file():
            return place
    return None


def load_colmap(folder: Path, model_folder: Path) -> Scene:
    """Read the scene of a folder with images/ (or images in the folder itself). They are read when they are used.

    Views are sorted by name. Near and far are the extremes over the views of the 0.1 and 99.9 percentiles of the depths
    of the points that each view sees.

    Raises:
        InputError: a file is missing or damaged, an image is not of its camera's size, no view sees a point.
        UnsupportedError: a lens with distortion.
    """
    model = read_model(model_folder)
    images = folder / "images" if (folder / "images").is_dir() else folder
    views, near, far = [], [], []
    for photograph in sorted(model.photographs, key=lambda photograph: photograph.name):
        if photograph.camera not in model.cameras:
            raise InputError(
                f"{model_folder}: {photograph.name!r} has the camera {photograph.camera}, which is missing"
            )
        to_camera = _world_to_camera(model_folder, photograph)
        views.append(_view(images, photograph, model.cameras[photograph.camera], to_camera))
        places = [model.points[number] for number in photograph.points if number in model.points]
        depths = np.array(places).reshape(-1, 3) @ to_camera[2, :3] + to_camera[2, 3]
        if (depths > 0).any():
            low, high = np.percentile(depths[depths > 0], _PERCENTILES)
            near.append(float(low))
            far.append(float(high))
    if not near:
        raise InputError(f"{model_folder}: no image sees a point of points3D, so that near and far are unknown")
    return Scene(folder.resolve().name, tuple(views), min(near), max(far))


def _world_to_camera(folder: Path, photograph: Photograph) -> NDArray[np.float64]:
    quaternion = np.array(photograph.quaternion)
    length = np.linalg.norm(quaternion)
    if not abs(length - 1) < 1e-3:
        raise InputError(f"{folder}: the quaternion of {photograph.name!r} has the length {length:.4g}, not 1")
    w, x, y, z = quaternion / length
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, photograph.translation
    return pose


def _view(images: Path, photograph: Photograph, camera: Camera, to_camera: NDArray[np.float64]) -> View:
    file, values = images / photograph.name, camera.parameters
    bent = {key: value for key, value in values.items() if key not in {"f", "fx", "fy", "cx", "cy"}}
    if "FISHEYE" in camera.model or any(bent.values()):
        raise UnsupportedError(
            f"camera {photograph.camera} is {camera.model} with {bent or 'no parameters'}: undistort the images first "
            "(colmap image_undistorter)"
        )
    height, width = read_size(photograph.name, file)
    if (width, height) != (camera.width, camera.height):
        raise InputError(
            f"{file} is {width} x {height}, but camera {photograph.camera} is for {camera.width} x {camera.height}"
        )
    focal_x, focal_y = (values.get(key, values.get("f", 0.0)) for key in ("fx", "fy"))
    intrinsics = torch.tensor([[focal_x, 0, values["cx"]], [0, focal_y, values["cy"]], [0, 0, 1]], dtype=torch.float32)
    pose = torch.from_numpy(np.linalg.inv(to_camera)).float()
    return View(photograph.name, file, intrinsics, pose)
