"""A stage to put shapes on: collects what Mitsuba loads. Units: about a metre; z is up; the cameras look along +y."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mitsuba as mi
import numpy as np
from meshes import Mesh
from textures import TEXTURES, Bitmap, Generator, palette

Material = dict[str, Any]


class Stage:
    """The shapes, materials and lights of one scene.

    Args:
        rng: every choice that a design leaves open.
        folder: where meshes are written, to be read when the scene is loaded.
    """

    def __init__(self, rng: Generator, folder: Path) -> None:
        self.rng = rng
        self.entries: dict[str, Any] = {"type": "scene", "integrator": {"type": "path", "max_depth": 5}}
        self._folder = folder
        self._deck: list[Callable[[Generator], Bitmap]] = []

    def texture(
        self, kind: Callable[[Generator], Bitmap] | None = None, repeat: float | tuple[float, float] = 1.0
    ) -> dict[str, Any]:
        """Return a bitmap; without `kind`, the next of a shuffled deck: a scene has many different ones.

        `repeat` is how often it runs over the shape: along both directions, or (u, v).
        """
        if kind is None:
            if not self._deck:
                self._deck = [TEXTURES[index] for index in self.rng.permutation(len(TEXTURES))]
            kind = self._deck.pop()
        u, v = (repeat, repeat) if isinstance(repeat, (int, float)) else repeat
        to_uv = mi.ScalarTransform4f().scale([u, v, 1])
        return {"type": "bitmap", "bitmap": mi.Bitmap(kind(self.rng)), "to_uv": to_uv}

    def matt(
        self, kind: Callable[[Generator], Bitmap] | None = None, repeat: float | tuple[float, float] = 1.0
    ) -> Material:
        """Return a textured material without highlights."""
        return _two_sided({"type": "diffuse", "reflectance": self.texture(kind, repeat)})

    def glossy(self, kind: Callable[[Generator], Bitmap] | None = None, roughness: float = 0.1) -> Material:
        """Return a textured material with highlights, like glazed pottery."""
        return _two_sided({"type": "roughplastic", "alpha": roughness, "diffuse_reflectance": self.texture(kind)})

    def plain(self, colour: Sequence[float] | None = None) -> Material:
        """Return a glossy material of one colour."""
        chosen = palette(self.rng)[0] if colour is None else colour
        return _two_sided({"type": "roughplastic", "alpha": 0.15, "diffuse_reflectance": _rgb(chosen)})

    def metal(self, colour: Sequence[float] = (0.9, 0.9, 0.9), roughness: float = 0.05) -> Material:
        """Return a metal; below a roughness of 0.02, a mirror."""
        if roughness < 0.02:
            return _two_sided({"type": "conductor", "material": "none", "specular_reflectance": _rgb(colour)})
        return _two_sided(
            {"type": "roughconductor", "material": "none", "alpha": roughness, "specular_reflectance": _rgb(colour)}
        )

    def box(self, centre: Sequence[float], size: Sequence[float], material: Material, turn: float = 0.0) -> None:
        """Add a box; `turn` is about z, in degrees."""
        half = [value / 2 for value in size]
        self._add({"type": "cube", "to_world": _place(centre, turn).scale(half), "bsdf": material})

    def ball(self, centre: Sequence[float], radius: float, material: Material) -> None:
        """Add a sphere, its texture turned at random."""
        turn = (
            _place(centre, self.rng.uniform(0, 360)).rotate([1, 0, 0], self.rng.uniform(-40, 40)).scale(float(radius))
        )
        self._add({"type": "sphere", "to_world": turn, "bsdf": material})

    def column(self, foot: Sequence[float], radius: float, height: float, material: Material) -> None:
        """Add an upright cylinder with a lid."""
        top = [foot[0], foot[1], foot[2] + height]
        self._add({"type": "cylinder", "p0": list(foot), "p1": top, "radius": radius, "bsdf": material})
        self._add({"type": "disk", "to_world": _place(top).scale(float(radius)), "bsdf": material})

    def mesh(self, mesh: Mesh, at: Sequence[float], material: Material, turn: float = 0.0, tilt: float = 0.0) -> None:
        """Add a mesh; `turn` about z and `tilt` about its own x axis, in degrees."""
        path = self._folder / f"{len(self.entries)}.ply"
        mesh.write_ply(path)
        to_world = _place(at, turn).rotate([1, 0, 0], tilt)
        self._add({"type": "ply", "filename": str(path), "to_world": to_world, "bsdf": material})

    def floor(self, material: Material, level: float = 0.0) -> None:
        """Add the ground, 16 wide."""
        self._add({"type": "rectangle", "to_world": _place([0, 2, level]).scale(8), "bsdf": material})

    def wall(self, y: float, material: Material, x: float = 0.0, turn: float = 0.0, width: float = 16.0) -> None:
        """Add an upright wall, 4.8 high, which faces the cameras."""
        to_world = _place([x, y, 2.3], turn).rotate([1, 0, 0], 90).scale([width / 2, 2.4, 1])
        self._add({"type": "rectangle", "to_world": to_world, "bsdf": material})

    def light(self, sun: float = 5.2, sky: float = 0.62, colour: Sequence[float] = (1.0, 0.96, 0.9)) -> None:
        """Add a square lamp behind the cameras, to a side, and an even sky."""
        side = self.rng.choice([-1, 1]) * self.rng.uniform(1.5, 3)
        to_world = mi.ScalarTransform4f().look_at(origin=[side, -3.5, 6.0], target=[0, 0, 0.5], up=[0, 0, 1])
        radiance = _rgb([sun * value for value in colour])
        self._add(
            {
                "type": "rectangle",
                "to_world": to_world @ mi.ScalarTransform4f().scale(2.0),
                "emitter": {"type": "area", "radiance": radiance},
            }
        )
        self._add({"type": "constant", "radiance": _rgb([sky * 0.92, sky * 0.97, sky * 1.05])})

    def _add(self, entry: dict[str, Any]) -> None:
        self.entries[f"entry{len(self.entries)}"] = entry


def _rgb(values: Sequence[float]) -> dict[str, Any]:
    return {"type": "rgb", "value": [float(value) for value in np.asarray(values)]}


def _two_sided(material: Material) -> Material:
    return {"type": "twosided", "bsdf": material}


def _place(at: Sequence[float], turn: float = 0.0) -> Any:
    return mi.ScalarTransform4f().translate([float(value) for value in at]).rotate([0, 0, 1], float(turn))
