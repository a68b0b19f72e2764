"""Render the scenes that ship with vitrify, src/vitrify/nvs/scenes/, with Mitsuba 3: `python tools/render_scenes.py`.

Ten scenes to train on and two held out, 30 posed views of 96 x 72 each. Needs `pip install 'vitrify[scenes]'` and no
GPU. Every seed is fixed: the same version of Mitsuba gives the same images.

A scene is a folder with PNGs and a transforms.json of the form that NeRF's synthetic scenes have (OpenGL axes: x to the
right, y up, the camera looks along -z), with near and far added, which are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mitsuba as mi
import numpy as np
from numpy.typing import NDArray
from PIL import Image

mi.set_variant("scalar_rgb")
sys.path.insert(0, str(Path(__file__).parent / "scenes"))

from designs import HELD_OUT, TRAIN  # noqa: E402
from stage import Stage  # noqa: E402

OUTPUT = Path(__file__).parents[1] / "src" / "vitrify" / "nvs" / "scenes"
WIDTH, HEIGHT, VIEWS = 96, 72, 30
FIELD_OF_VIEW = 42.0
Array = NDArray[np.float64]


def main() -> None:
    """Render the scenes named, or all."""
    designs = {design.__name__: design for design in (*TRAIN, *HELD_OUT)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", nargs="*", metavar="SCENE", help=f"default: all of {', '.join(designs)}")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--samples", type=int, default=144, help="paths a pixel")
    arguments = parser.parse_args()
    for name in arguments.scenes or designs:
        started = time.perf_counter()
        split = "held_out" if designs[name] in HELD_OUT else "train"
        render(designs[name], list(designs).index(name), arguments.output / split / name, arguments.samples)
        print(f"{name}: {VIEWS} views in {time.perf_counter() - started:.0f} s", flush=True)


def render(design: Callable[[Stage], None], seed: int, folder: Path, samples: int, views: int = VIEWS) -> None:
    """Write the images and transforms.json of one scene into `folder`."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    poses = cameras(np.random.default_rng(1000 + seed), VIEWS)[:views]
    with tempfile.TemporaryDirectory() as meshes:
        stage = Stage(rng, Path(meshes))
        stage.light()
        design(stage)
        scene = mi.load_dict(stage.entries)
    depths = np.stack([depth(scene, pose) for pose in poses])
    frames = []
    for index, pose in enumerate(poses):
        image = mi.render(scene, sensor=sensor(pose, samples), seed=100 * seed + index, spp=samples)
        pixels = np.array(mi.Bitmap(image).convert(mi.Bitmap.PixelFormat.RGB, mi.Struct.Type.UInt8, srgb_gamma=True))
        Image.fromarray(pixels).save(folder / f"{index:03}.png", optimize=True)
        frames.append({"file_path": f"./{index:03}", "transform_matrix": pose.round(7).tolist()})
    seen = depths[np.isfinite(depths)]
    transforms = {
        "camera_angle_x": float(np.radians(FIELD_OF_VIEW)),
        "near": round(float(0.95 * seen.min()), 3),
        "far": round(float(1.05 * seen.max()), 3),
        "frames": frames,
    }
    (folder / "transforms.json").write_text(json.dumps(transforms, indent=1) + "\n")


def cameras(rng: np.random.Generator, count: int) -> Array:
    """Return (count, 4, 4) camera-to-world matrices, OpenGL axes, on a part of a dome, evenly spread in any prefix.

    They look at (0, 0.2, 0.6) or close to it from about 4 away, within 26 degrees to either side of -y and 12 to 38 up.
    """
    # Roberts' R2 sequence: low discrepancy, so that views held out by their number lie among the others.
    sequence = (0.5 + np.arange(count)[:, None] * [0.7548776662, 0.5698402910]) % 1
    side = np.radians(-26 + 52 * sequence[:, 0])
    up = np.radians(12 + 26 * sequence[:, 1])
    target = np.array([0, 0.2, 0.6]) + rng.normal(0, 0.08, (count, 3))
    radius = rng.uniform(3.7, 4.3, (count, 1))
    direction = np.stack([np.sin(side) * np.cos(up), -np.cos(side) * np.cos(up), np.sin(up)], -1)
    backward = direction
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = np.stack([right, np.cross(backward, right), backward], -1)
    poses[:, :3, 3] = target + radius * direction
    return poses


def sensor(pose: Array, samples: int) -> mi.Sensor:
    """Return Mitsuba's camera, whose axes are x to the left, y up, z forward."""
    # Samples spread over the pixel and the lamps: 5 dB less noise than independent ones, at the same price.
    return mi.load_dict(
        {
            "type": "perspective",
            "fov": FIELD_OF_VIEW,
            "fov_axis": "x",
            "to_world": mi.ScalarTransform4f((pose @ np.diag([-1.0, 1, -1, 1])).tolist()),
            "film": {"type": "hdrfilm", "width": WIDTH, "height": HEIGHT, "rfilter": {"type": "box"}},
            "sampler": {"type": "multijitter", "sample_count": samples},
        }
    )


def depth(scene: mi.Scene, pose: Array) -> Array:
    """Return (HEIGHT, WIDTH): how far the first surface is along the camera's axis; infinite where there is none."""
    integrator = mi.load_dict({"type": "aov", "aovs": "distance:depth"})
    image = np.array(mi.render(scene, sensor=sensor(pose, 1), integrator=integrator, spp=1))[..., 0].astype(float)
    focal = WIDTH / 2 / np.tan(np.radians(FIELD_OF_VIEW / 2))
    x = np.arange(WIDTH) + 0.5 - WIDTH / 2
    y = np.arange(HEIGHT)[:, None] + 0.5 - HEIGHT / 2
    along = image / np.sqrt(1 + (x**2 + y**2) / focal**2)
    return np.where(image > 0, along, np.inf)


if __name__ == "__main__":
    main()
