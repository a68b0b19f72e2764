"""Triangle meshes with texture coordinates, from grids of points: what Mitsuba's own shapes do not cover."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Mesh:
    """`points` (n, 3), `uv` (n, 2), `faces` (m, 3), wound anticlockwise seen from outside."""

    points: Array
    uv: Array
    faces: NDArray[np.int64]

    def write_ply(self, path: Path) -> None:
        """Write a binary PLY file; Mitsuba makes the normals."""
        names = ("x", "y", "z", "u", "v")
        header = [
            "ply", "format binary_little_endian 1.0", f"element vertex {len(self.points)}",
            *(f"property float {name}" for name in names),
            f"element face {len(self.faces)}", "property list uchar int vertex_indices", "end_header\n",
        ]  # fmt: skip
        vertices = np.hstack([self.points, self.uv]).astype("<f4")
        faces = np.zeros(len(self.faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
        faces["count"], faces["corners"] = 3, self.faces
        path.write_bytes("\n".join(header).encode() + vertices.tobytes() + faces.tobytes())


def _from_grid(points: Array, repeat: tuple[float, float]) -> Mesh:
    """Join a grid (rows, columns, 3) into triangles; `repeat` is how often the texture runs over rows and columns."""
    rows, columns = points.shape[:2]
    index = np.arange(rows * columns).reshape(rows, columns)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]
    faces = np.concatenate([np.stack([a, b, c], -1).reshape(-1, 3), np.stack([a, c, d], -1).reshape(-1, 3)])
    v, u = np.meshgrid(np.linspace(0, repeat[0], rows), np.linspace(0, repeat[1], columns), indexing="ij")
    return Mesh(points.reshape(-1, 3), np.stack([u, v], -1).reshape(-1, 2), faces)


def vase(rng: np.random.Generator, height: float, radius: float) -> Mesh:
    """Return a surface of revolution about z, standing on z = 0, its profile a random smooth curve."""
    t = np.linspace(0, 1, 40)
    profile = 0.62 + sum(rng.uniform(-0.25, 0.25) * np.sin(np.pi * k * t + rng.uniform(0, 6)) for k in (1, 2, 3))
    profile = radius * np.clip(profile, 0.22, 1) * np.minimum(1, t * 12 + 0.02)
    angles = np.linspace(0, 2 * np.pi, 49)
    circle = np.stack([np.cos(angles), np.sin(angles)], -1)
    flat = profile[:, None, None] * circle
    z = np.broadcast_to((t * height)[:, None, None], (*flat.shape[:2], 1))
    return _from_grid(np.concatenate([flat, z], -1), (1, 2))


def torus_knot(p: int, q: int, radius: float, thickness: float) -> Mesh:
    """Return a tube along the (p, q) torus knot about the origin; (1, 0) is a plain ring in the x-y plane."""
    t = np.linspace(0, 2 * np.pi, 241)

    def curve(t: Array) -> Array:
        spread = 1 + 0.4 * np.cos(q * t) * bool(q)
        return radius * np.stack([spread * np.cos(p * t), spread * np.sin(p * t), 0.4 * np.sin(q * t)], -1)

    along = curve(t + 1e-4) - curve(t - 1e-4)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    out = curve(t) * [1, 1, 0]
    side = np.cross(along, out)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    up = np.cross(side, along)
    angles = np.linspace(0, 2 * np.pi, 21)[None, :, None]
    ring = np.cos(angles) * side[:, None] + np.sin(angles) * up[:, None]
    return _from_grid(curve(t)[:, None] + thickness * ring, (12, 1))


def hills(rng: np.random.Generator, width: float, height: float) -> Mesh:
    """Return a square of waves about the origin, `width` wide, between z = 0 and `height`, higher towards +y."""
    axis = np.linspace(-1, 1, 80)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    z = 0.8 * y
    for k in range(1, 5):
        direction = rng.uniform(0, 2 * np.pi)
        z = z + rng.uniform(0.4, 0.8) / k * np.sin(
            np.pi * k * (x * np.cos(direction) + y * np.sin(direction)) + rng.uniform(0, 6)
        )
    z = height * (z - z.min()) / (z.max() - z.min())
    return _from_grid(np.stack([x * width / 2, y * width / 2, z], -1), (3, 3))


def cone(height: float, radius: float) -> Mesh:
    """Return a cone about z with its base on z = 0."""
    angles = np.linspace(0, 2 * np.pi, 33)
    t = np.linspace(0, 1, 8)[:, None]
    spread = radius * (1 - 0.98 * t)
    points = np.stack([spread * np.cos(angles), spread * np.sin(angles), np.broadcast_to(t * height, (8, 33))], -1)
    return _from_grid(points, (1, 2))
