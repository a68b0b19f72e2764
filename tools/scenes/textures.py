"""Procedural bitmaps: (256, 256, 3) uint8, sRGB, which repeat without a seam. Coarse enough to be seen at 96 x 72."""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

SIZE = 256
Generator = np.random.Generator
Bitmap = NDArray[np.uint8]


def palette(rng: Generator, count: int = 4) -> NDArray[np.float64]:
    """Return (count, 3) colours of alternating lightness, around a common hue and its complement."""
    # Most near yellow: even draws of the hue give more blue and purple than one meets.
    hue = (0.12 + 0.5 * rng.uniform(-1, 1) ** 3 + 0.1 * rng.normal()) % 1
    rows = []
    for index in range(count):
        shade = (hue + 0.5 * (index % 2) + rng.normal(0, 0.07)) % 1
        value = (0.9, 0.35, 0.7, 0.55)[index % 4] + rng.normal(0, 0.05)
        rows.append(colorsys.hsv_to_rgb(shade, rng.uniform(0.3, 0.75), min(max(value, 0.1), 1)))
    return np.array(rows)


def checker(rng: Generator) -> Bitmap:
    """Return squares of two or three colours, with a little grain."""
    tiles = int(rng.choice([4, 6, 8]))
    colours = palette(rng, 3)
    table = colours[rng.integers(0, 3, (tiles, tiles))]
    table[::2, ::2], table[1::2, 1::2] = colours[0], colours[0]
    rows = np.arange(SIZE) * tiles // SIZE
    return _finish(table[rows][:, rows] * _grain(rng, 0.15))


def bricks(rng: Generator) -> Bitmap:
    """Return courses of bricks, each of its own shade."""
    y, x = _grid()
    rows, columns = 8, 4
    course = np.floor(y * rows).astype(int)
    along = x * columns + 0.5 * (course % 2)
    shade = rng.uniform(0.7, 1.15, (rows, columns))[course, np.floor(along).astype(int) % columns]
    joint = (np.abs(along % 1 - 0.5) > 0.46) | (np.abs(y * rows % 1 - 0.5) > 0.42)
    stone, mortar = palette(rng, 2)
    return _finish(np.where(joint[..., None], mortar, stone * shade[..., None]) * _grain(rng, 0.2))


def stripes(rng: Generator) -> Bitmap:
    """Return stripes of several colours and widths, which waver."""
    y, x = _grid()
    phase = (x + 0.04 * np.sin(2 * np.pi * (y * rng.integers(1, 4) + rng.random()))) * 12
    colours = palette(rng, 4)[rng.integers(0, 4, 12)]
    return _finish(colours[np.floor(phase).astype(int) % 12])


def marble(rng: Generator) -> Bitmap:
    """Return veins: a sine along a direction, bent by noise."""
    y, x = _grid()
    veins = np.sin(2 * np.pi * (x * rng.integers(1, 3) + y * rng.integers(1, 3)) + 5 * (_noise(rng, 4) - 0.5) * 2)
    first, second = palette(rng, 2)
    return _finish(_mix(first, second, (0.5 + 0.5 * veins) ** 1.5))


def wood(rng: Generator) -> Bitmap:
    """Return planks with grain along them."""
    y, _ = _grid()
    plank = np.floor(y * 6).astype(int)
    grain = np.sin(2 * np.pi * (8 * (y + 0.12 * _noise(rng, 3)) + rng.random(6)[plank]))
    tone = np.array(colorsys.hsv_to_rgb(rng.uniform(0.05, 0.1), 0.6, 0.7))
    shade = rng.uniform(0.65, 1.2, 6)[plank] * (1 + 0.18 * grain) * np.where(y * 6 % 1 < 0.05, 0.4, 1)
    return _finish(tone * shade[..., None])


def cells(rng: Generator) -> Bitmap:
    """Return the Voronoi cells of 24 points, as paving stones."""
    y, x = _grid()
    points = rng.random((24, 2))
    gaps = np.abs(np.stack([y, x], -1)[:, :, None] - points)
    distances = np.linalg.norm(np.minimum(gaps, 1 - gaps), axis=-1)
    nearest, second = np.sort(distances, axis=-1)[..., :2].transpose(2, 0, 1)
    colours = palette(rng, 4)[rng.integers(0, 4, 24)] * rng.uniform(0.8, 1.1, (24, 1))
    image = colours[distances.argmin(-1)]
    return _finish(np.where((second - nearest < 0.018)[..., None], 0.15, image) * _grain(rng, 0.15))


def dots(rng: Generator) -> Bitmap:
    """Return discs of several sizes and colours on a plain ground."""
    y, x = _grid()
    ground, *colours = palette(rng, 4)
    image = np.broadcast_to(ground, (SIZE, SIZE, 3)).copy()
    for _ in range(28):
        gap_y, gap_x = (np.abs(axis - rng.random()) for axis in (y, x))
        inside = np.hypot(np.minimum(gap_y, 1 - gap_y), np.minimum(gap_x, 1 - gap_x)) < rng.uniform(0.04, 0.11)
        image[inside] = colours[rng.integers(3)]
    return _finish(image)


def clouds(rng: Generator) -> Bitmap:
    """Return smooth noise between three colours: grass, sand, plaster."""
    first, second, third = palette(rng, 3)
    return _finish(_mix(_mix(first, second, _noise(rng, 5)), third, _noise(rng, 10) ** 2))


def poster(rng: Generator) -> Bitmap:
    """Return a picture: a gradient, a few large shapes, a frame."""
    y, x = _grid()
    colours = palette(rng, 4)
    image = _mix(colours[0], colours[2], y)
    for index in range(6):
        centre_y, centre_x, radius = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.08, 0.25)
        angle = rng.uniform(0, np.pi)
        u = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
        v = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
        norm = np.hypot(u, v) if index % 2 else np.maximum(np.abs(u), np.abs(v))
        image[norm < radius] = colours[rng.integers(4)] * rng.uniform(0.6, 1.2)
    image[np.maximum(np.abs(x - 0.5), np.abs(y - 0.5)) > 0.45] = colours[1] * 0.5
    return _finish(image)


TEXTURES: tuple[Callable[[Generator], Bitmap], ...] = (
    checker, bricks, stripes, marble, wood, cells, dots, clouds, poster,
)  # fmt: skip


def _grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    axis = (np.arange(SIZE) + 0.5) / SIZE
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def _noise(rng: Generator, frequency: int) -> NDArray[np.float64]:
    """Return periodic noise in [0, 1]: random Fourier coefficients up to a frequency."""
    y, x = _grid()
    total = np.zeros((SIZE, SIZE))
    for ky in range(-frequency, frequency + 1):
        for kx in range(frequency + 1):
            if 0 < ky * ky + kx * kx <= frequency**2:
                weight = rng.normal() / np.hypot(ky, kx)
                total += weight * np.cos(2 * np.pi * (ky * y + kx * x + rng.random()))
    return (total - total.min()) / (total.max() - total.min())


def _grain(rng: Generator, strength: float) -> NDArray[np.float64]:
    return (1 + strength * (_noise(rng, 12) - 0.5))[..., None]


def _mix(first: NDArray[np.float64], second: NDArray[np.float64], share: NDArray[np.float64]) -> NDArray[np.float64]:
    return first + (second - first) * share[..., None]


def _finish(image: NDArray[np.float64]) -> Bitmap:
    return (np.clip(image, 0.03, 0.97) * 255).round().astype(np.uint8)
