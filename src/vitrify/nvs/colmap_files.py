"""The files of COLMAP's sparse models: cameras, images and points3D, as text (.txt) and binary (.bin)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from vitrify.errors import InputError

# COLMAP's camera models, in the order of their numbers in binary files, and their parameters.
CAMERA_MODELS = {
    "SIMPLE_PINHOLE": ("f", "cx", "cy"),
    "PINHOLE": ("fx", "fy", "cx", "cy"),
    "SIMPLE_RADIAL": ("f", "cx", "cy", "k"),
    "RADIAL": ("f", "cx", "cy", "k1", "k2"),
    "OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2"),
    "OPENCV_FISHEYE": ("fx", "fy", "cx", "cy", "k1", "k2", "k3", "k4"),
    "FULL_OPENCV": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"),
    "FOV": ("fx", "fy", "cx", "cy", "omega"),
    "SIMPLE_RADIAL_FISHEYE": ("f", "cx", "cy", "k"),
    "RADIAL_FISHEYE": ("f", "cx", "cy", "k1", "k2"),
    "THIN_PRISM_FISHEYE": ("fx", "fy", "cx", "cy", "k1", "k2", "p1", "p2", "k3", "k4", "sx1", "sy1"),
}
Point = tuple[float, float, float]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Camera:
    """A lens: its model, the size of its images in pixels, and its parameters by name."""

    model: str
    width: int
    height: int
    parameters: dict[str, float]


@dataclass(frozen=True)
class Photograph:
    """An image: world to camera as a quaternion (w, x, y, z) and a shift; and the points seen, by their numbers."""

    name: str
    camera: int
    quaternion: tuple[float, ...]
    translation: tuple[float, ...]
    points: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """Cameras by number, photographs in the file's order, points by number."""

    cameras: dict[int, Camera]
    photographs: list[Photograph]
    points: dict[int, Point]


def read_model(folder: Path) -> Model:
    """Read a model: binary where there is cameras.bin, else text. Raises InputError naming a damaged file."""
    if (folder / "cameras.bin").is_file():
        return Model(
            _read(folder / "cameras.bin", lambda content: _binary_cameras(_Bytes(content))),
            _read(folder / "images.bin", lambda content: _binary_images(_Bytes(content))),
            _read(folder / "points3D.bin", lambda content: _binary_points(_Bytes(content))),
        )
    return Model(
        _read(folder / "cameras.txt", lambda content: _text_cameras(_lines(content))),
        _read(folder / "images.txt", lambda content: _text_images(_lines(content))),
        _read(folder / "points3D.txt", lambda content: _text_points(_lines(content))),
    )


def _read(file: Path, parse: Callable[[bytes], _T]) -> _T:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        return parse(content)
    except (ValueError, IndexError, struct.error) as error:
        raise InputError(f"{file} is damaged: {error}") from error


def _camera(model: str, width: int, height: int, parameters: list[float]) -> Camera:
    if model not in CAMERA_MODELS:
        raise ValueError(f"no camera model {model!r}; there are {', '.join(CAMERA_MODELS)}")
    return Camera(model, width, height, dict(zip(CAMERA_MODELS[model], parameters, strict=True)))


def _lines(content: bytes) -> Iterator[str]:
    return (line for line in content.decode().splitlines() if not line.startswith("#"))


def _text_cameras(lines: Iterator[str]) -> dict[int, Camera]:
    cameras = {}
    for line in filter(str.strip, lines):
        number, model, width, height, *parameters = line.split()
        cameras[int(number)] = _camera(model, int(width), int(height), [float(value) for value in parameters])
    return cameras


def _text_images(lines: Iterator[str]) -> list[Photograph]:
    photographs = []
    for line in lines:
        if not line.strip():
            continue
        _, *pose, camera, name = line.split(maxsplit=9)
        values = tuple(float(value) for value in pose)
        # The second line, of x, y and point in turn, is empty for an image that sees no point.
        points = tuple(int(number) for number in next(lines, "").split()[2::3])
        photographs.append(Photograph(name.strip(), int(camera), values[:4], values[4:], points))
    return photographs


def _text_points(lines: Iterator[str]) -> dict[int, Point]:
    points = {}
    for line in filter(str.strip, lines):
        number, x, y, z, *_ = line.split()
        points[int(number)] = float(x), float(y), float(z)
    return points


class _Bytes:
    """Little-endian values, one after the other."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def take(self, layout: str) -> tuple[int | float, ...]:
        values = struct.unpack_from("<" + layout, self._content, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def count(self) -> int:
        return int(self.take("Q")[0])

    def skip(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        if self._at > len(self._content):
            raise ValueError(f"it ends after {len(self._content)} bytes, {self._at} were expected")
        return self._content[start : self._at]

    def text(self) -> str:
        return self.skip(self._content.index(b"\0", self._at) + 1 - self._at)[:-1].decode()


def _binary_cameras(content: _Bytes) -> dict[int, Camera]:
    cameras = {}
    for _ in range(content.count()):
        number, model, width, height = (int(value) for value in content.take("iiQQ"))
        if not 0 <= model < len(CAMERA_MODELS):
            raise ValueError(f"no camera model has the number {model}")
        name = list(CAMERA_MODELS)[model]
        parameters = [float(value) for value in content.take(f"{len(CAMERA_MODELS[name])}d")]
        cameras[number] = _camera(name, width, height, parameters)
    return cameras


def _binary_images(content: _Bytes) -> list[Photograph]:
    photographs = []
    for _ in range(content.count()):
        _, *pose, camera = content.take("i7di")
        name = content.text()
        seen = np.frombuffer(content.skip(24 * content.count()), dtype=[("place", "<f8", 2), ("point", "<i8")])
        points = tuple(seen["point"].tolist())
        photographs.append(Photograph(name, int(camera), tuple(pose[:4]), tuple(pose[4:]), points))
    return photographs


def _binary_points(content: _Bytes) -> dict[int, Point]:
    points = {}
    for _ in range(content.count()):
        number, x, y, z = content.take("Q3d")
        content.take("3Bd")  # colour and error
        content.skip(8 * content.count())  # the images that see it
        points[int(number)] = x, y, z
    return points
