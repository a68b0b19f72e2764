"""A scene: posed photographs, the range of depths that they show, and the colour where they show nothing.

Conventions, the same everywhere in `vitrify.nvs`: camera axes as in OpenCV (x to the right, y down, z forward); the
centre of the first pixel is at (0.5, 0.5); depth is the distance along z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vitrify.errors import InputError

_RIGID_TOLERANCE = 1e-3
WHITE = (1.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class View:
    """A photograph and the camera that took it.

    Args:
        name: unique in its scene; the file name, as a rule.
        image: (3, H, W) float32 in [0, 1]; or a file, which is read when `rgb` is called.
        intrinsics: (3, 3) float32, in pixels of that image: [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].
        camera_to_world: (4, 4) float32, a rigid motion, OpenCV axes.
        backdrop: red, green and blue in [0, 1] behind the transparent pixels of an image file.
        shrink: `rgb` averages so many pixels in either direction into one; use `shrunk`, which adapts the intrinsics.

    Attributes:
        height, width: of what `rgb` returns.

    Raises:
        InputError: the image is missing or has another shape, the intrinsics do not fit it, the pose is not rigid.
    """

    name: str
    image: Tensor | Path
    intrinsics: Tensor
    camera_to_world: Tensor
    backdrop: tuple[float, float, float] = WHITE
    shrink: int = 1
    height: int = field(init=False)
    width: int = field(init=False)

    def __post_init__(self) -> None:
        height, width = _image_size(self.name, self.image)
        object.__setattr__(self, "height", height // self.shrink)
        object.__setattr__(self, "width", width // self.shrink)
        check_intrinsics(self.name, self.intrinsics, self.height, self.width)
        check_pose(self.name, self.camera_to_world)

    def rgb(self) -> Tensor:
        """Return the image, (3, height, width) float32 in [0, 1]. Raises InputError where the file is damaged."""
        image = self.image if isinstance(self.image, Tensor) else _read_rgb(self.image, self.backdrop)
        if self.shrink == 1:
            return image
        return F.interpolate(image[None], (self.height, self.width), mode="area")[0]

    def shrunk(self, factor: int) -> View:
        """Return this view with `factor` times fewer pixels in either direction."""
        largest = min(self.height, self.width)
        if not 1 <= factor <= largest:
            raise InputError(f"view {self.name!r} is {_size(self)}: it can be shrunk by 1 to {largest}, not {factor}")
        height, width = self.height // factor, self.width // factor
        scale = torch.tensor([width / self.width, height / self.height, 1.0])
        return replace(self, intrinsics=self.intrinsics * scale[:, None], shrink=self.shrink * factor)


@dataclass(frozen=True, eq=False)
class Scene:
    """Views of one scene.

    Args:
        name: of the scene.
        views: at least one; their names are unique.
        near, far: the depths between which rays are sampled, in units of the poses; 0 < near < far.
        background: (3,) float32 in [0, 1], the colour of rays that no source view sees.

    Raises:
        InputError: one of these does not hold.
    """

    name: str
    views: tuple[View, ...]
    near: float
    far: float
    background: Tensor = field(default_factory=lambda: torch.tensor(WHITE))

    def __post_init__(self) -> None:
        if not self.views:
            raise InputError(f"scene {self.name!r} has no views")
        names = [view.name for view in self.views]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"scene {self.name!r} has two views named {twice!r}")
        if not 0 < self.near < self.far < float("inf"):
            raise InputError(f"scene {self.name!r}: near must be above 0 and below far, not {self.near} and {self.far}")
        if self.background.shape != (3,) or not ((self.background >= 0) & (self.background <= 1)).all():
            raise InputError(
                f"scene {self.name!r}: the background must be 3 values in [0, 1], not {self.background.tolist()}"
            )

    def select(self, indices: Sequence[int]) -> Scene:
        """Return the scene with these views only, in this order."""
        return replace(self, views=tuple(self.views[index] for index in indices))

    def shrunk(self, factor: int) -> Scene:
        """Return the scene with `factor` times fewer pixels in either direction."""
        return replace(self, views=tuple(view.shrunk(factor) for view in self.views))

    def in_memory(self) -> Scene:
        """Return the scene with every image read: 12 bytes a pixel, and no decoding ever after."""
        return replace(self, views=tuple(replace(view, image=view.rgb(), shrink=1) for view in self.views))


def check_pose(name: str, pose: Tensor) -> None:
    """Raise InputError unless `pose` is a finite (4, 4) float32 rigid motion: a rotation and a shift, no scale."""
    if pose.shape != (4, 4) or pose.dtype != torch.float32:
        raise InputError(f"view {name!r}: a pose is (4, 4) float32, not {tuple(pose.shape)} {pose.dtype}")
    if not pose.isfinite().all():
        raise InputError(f"view {name!r}: its pose has values that are not finite: {pose.tolist()}")
    if pose[3].tolist() != [0, 0, 0, 1]:
        raise InputError(f"view {name!r}: the last row of a pose is 0 0 0 1, not {pose[3].tolist()}")
    rotation = pose[:3, :3].double()
    error = (rotation.T @ rotation - torch.eye(3, dtype=torch.float64)).abs().max().item()
    determinant = torch.linalg.det(rotation).item()
    if error > _RIGID_TOLERANCE or determinant < 0:
        raise InputError(
            f"view {name!r}: its pose is not rigid: R^T R is off the identity by {error:.2g} (at most "
            f"{_RIGID_TOLERANCE:g}) and det R = {determinant:.3g} (must be 1): a scale, or a mirrored axis"
        )


def check_intrinsics(name: str, intrinsics: Tensor, height: int, width: int) -> None:
    """Raise InputError unless `intrinsics` are those of an image of this size.

    Images are often scaled down without their intrinsics. That moves the principal point out of the middle half of the
    image, where cameras have it: half the size is enough to notice.
    """
    if intrinsics.shape != (3, 3) or intrinsics.dtype != torch.float32:
        raise InputError(
            f"view {name!r}: intrinsics are (3, 3) float32, not {tuple(intrinsics.shape)} {intrinsics.dtype}"
        )
    (fx, skew, cx), (zero, fy, cy), last = intrinsics.tolist()
    if not intrinsics.isfinite().all() or fx <= 0 or fy <= 0 or skew or zero or last != [0, 0, 1]:
        raise InputError(
            f"view {name!r}: intrinsics are [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with positive focal lengths, "
            f"not {intrinsics.tolist()}"
        )
    if not (width / 4 < cx < width * 3 / 4 and height / 4 < cy < height * 3 / 4):
        raise InputError(
            f"view {name!r}: the principal point ({cx:g}, {cy:g}) is not near the middle of an image of {width} x "
            f"{height} pixels: these intrinsics belong to another size, about {2 * cx:.0f} x {2 * cy:.0f}"
        )


def read_size(name: str, path: Path) -> tuple[int, int]:
    """Return (height, width) of an image file. Raises InputError naming the view where there is no such image."""
    if not path.is_file():
        raise InputError(f"view {name!r}: there is no image {path}")
    try:
        with Image.open(path) as file:
            return file.height, file.width
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged files.
        raise InputError(f"view {name!r}: cannot read the image {path}: {error}") from error


def _image_size(name: str, image: Tensor | Path) -> tuple[int, int]:
    if not isinstance(image, Tensor):
        return read_size(name, image)
    if image.ndim != 3 or image.shape[0] != 3 or image.dtype != torch.float32:
        raise InputError(f"view {name!r}: an image is (3, H, W) float32, not {tuple(image.shape)} {image.dtype}")
    return image.shape[1], image.shape[2]


def _read_rgb(path: Path, backdrop: tuple[float, float, float]) -> Tensor:
    # EXIF rotation is left alone: poses and intrinsics are those of the pixels as they are stored.
    try:
        with Image.open(path) as file:
            pixels = np.asarray(file.convert("RGBA"), dtype=np.float32) / 255
    except Exception as error:
        raise InputError(f"cannot read the image {path}: {type(error).__name__}: {error}") from error
    alpha = pixels[..., 3:]
    rgb = pixels[..., :3] * alpha + np.asarray(backdrop, dtype=np.float32) * (1 - alpha)
    return torch.from_numpy(np.ascontiguousarray(rgb.transpose(2, 0, 1)))


def _size(view: View) -> str:
    return f"{view.width} x {view.height}"
