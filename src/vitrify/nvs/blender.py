"""Scenes in the form of NeRF's synthetic ones: transforms.json, or transforms_train.json and transforms_test.json.

Mildenhall et al., "NeRF", ECCV 2020. Instant-NGP and Nerfstudio write the same file with more keys; those that say
where the camera's centre is are read.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrify.errors import InputError, UnsupportedError
from vitrify.nvs.scene import Scene, View, read_size

FILES = ("transforms.json", "transforms_train.json")
# The cameras of NeRF's synthetic scenes are 4 away from objects of radius 2.
_NEAR, _FAR = 2.0, 6.0
_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0]))
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")


def load_blender(folder: Path) -> Scene:
    """Read the scene of a folder. Its views are named by their files: "train/r_0.png".

    Of two files, train and test, the views follow one another. Without "near" and "far" in the file, they are those of
    the synthetic scenes, 2 and 6. Transparent pixels become white. Images are read when they are used.

    Raises:
        InputError: a file is missing or damaged, a key is missing, or a view is not one (see `View`).
        UnsupportedError: a camera with lens distortion.
    """
    files = [folder / name for name in (*FILES, "transforms_test.json") if (folder / name).is_file()]
    if not files:
        raise InputError(f"{folder} has none of {', '.join(FILES)}")
    contents = [_read(file) for file in files]
    views = tuple(
        _view(file, content, frame)
        for file, content in zip(files, contents, strict=True)
        for frame in _frames(file, content)
    )
    near, far = (_number(files[0], contents[0], key, default) for key, default in (("near", _NEAR), ("far", _FAR)))
    return Scene(folder.resolve().name, views, near, far)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold an object with frames, not {type(content).__name__}")
    return content


def _frames(file: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    frames = content.get("frames")
    if not isinstance(frames, list) or not all(isinstance(frame, dict) and "file_path" in frame for frame in frames):
        raise InputError(f"{file}: 'frames' must be a list of objects, each with file_path and transform_matrix")
    for name in (frame["file_path"] for frame in frames):
        if not isinstance(name, str) or not Path(name).name:
            raise InputError(f"{file}: a file_path must name an image, not {name!r}")
    return frames


def _view(file: Path, content: dict[str, Any], frame: dict[str, Any]) -> View:
    name = frame["file_path"]
    path = file.parent / name
    # NeRF leaves the ending out. What follows the last dot may be a part of the name: "frame_1.5".
    if not path.is_file() and path.with_name(path.name + ".png").is_file():
        path = path.with_name(path.name + ".png")
    label = Path(name).with_name(path.name).as_posix()
    values = {**content, **frame}
    if any(_number(file, values, key, 0) for key in _DISTORTION):
        raise UnsupportedError(f"{file}: view {label!r} has lens distortion: undistort the images first")
    return View(label, path, _intrinsics(file, label, path, values), _pose(file, label, frame))


def _intrinsics(file: Path, label: str, path: Path, values: dict[str, Any]) -> Tensor:
    height, width = read_size(label, path)
    for key, size in (("w", width), ("h", height)):
        if (stated := _number(file, values, key, size)) != size:
            raise InputError(
                f"{file}: {key} is {stated:g}, but {path} is {width} x {height}: intrinsics of another size"
            )
    if "fl_x" in values:
        focal_x = _number(file, values, "fl_x", 0.0)
    elif "camera_angle_x" in values:
        focal_x = width / 2 / math.tan(_number(file, values, "camera_angle_x", 0.0) / 2 or math.nan)
    else:
        raise InputError(f"{file} has neither camera_angle_x nor fl_x: the focal length is unknown")
    focal_y = _number(file, values, "fl_y", focal_x)
    centre = _number(file, values, "cx", width / 2), _number(file, values, "cy", height / 2)
    return torch.tensor([[focal_x, 0, centre[0]], [0, focal_y, centre[1]], [0, 0, 1]], dtype=torch.float32)


def _pose(file: Path, label: str, frame: dict[str, Any]) -> Tensor:
    """Turn OpenGL axes (x right, y up, z backward) into OpenCV's."""
    try:
        matrix = np.asarray(frame["transform_matrix"], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{file}: view {label!r} needs a transform_matrix of 4 x 4 numbers") from error
    if matrix.shape != (4, 4):
        raise InputError(f"{file}: the transform_matrix of view {label!r} is {matrix.shape}, not (4, 4)")
    return torch.from_numpy(matrix).float() @ _TO_OPENCV


def _number(file: Path, values: dict[str, Any], key: str, default: float) -> float:
    if key not in values:
        return default
    value: object = values[key]
    # JSON's integers have any length, and Python reads its Infinity and NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise InputError(f"{file}: {key} must be a finite number, not {repr(value)[:40]}")
    return float(value)
