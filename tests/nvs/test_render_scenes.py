"""The tool that rendered the shipped scenes: the same images again, and cameras where the readers say they are."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vitrify.nvs.blender import load_blender
from vitrify.nvs.projection import project
from vitrify.nvs.rays import pixel_rays

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mitsuba") is None, reason="Mitsuba is not installed (extra scenes)"),
]
TOOLS = Path(__file__).parents[2] / "tools"
SHIPPED = Path(__file__).parents[2] / "src" / "vitrify" / "nvs" / "scenes"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    import render_scenes  # noqa: PLC0415

    return render_scenes


def test_the_shipped_images_come_out_again(tool, tmp_path):
    design, number = tool.HELD_OUT[0], len(tool.TRAIN)
    tool.render(design, number, tmp_path, samples=144, views=1)
    again = np.asarray(Image.open(tmp_path / "000.png")).astype(int)
    shipped = np.asarray(Image.open(SHIPPED / "held_out" / design.__name__ / "000.png")).astype(int)
    # Another version of Mitsuba, or another processor's arithmetic, may move single samples.
    assert np.abs(again - shipped).mean() < 1
    assert np.array_equal(
        load_blender(tmp_path).views[0].camera_to_world,
        load_blender(SHIPPED / "held_out" / design.__name__).views[0].camera_to_world,
    )


def test_depths_of_two_cameras_are_those_of_one_world(tool, tmp_path):
    """What one camera sees at some depth is, seen from another, there too: intrinsics and poses are the renderer's."""
    import mitsuba  # noqa: PLC0415

    wall = mitsuba.ScalarTransform4f().translate([0, 2, 0]).rotate([1, 0, 0], 60).scale(9)
    ball = {"type": "sphere", "center": [0.2, 0.1, 0.6], "radius": 0.5}
    scene = mitsuba.load_dict({"type": "scene", "ball": ball, "wall": {"type": "rectangle", "to_world": wall}})
    poses = tool.cameras(np.random.default_rng(0), 2)
    depths = [torch.from_numpy(tool.depth(scene, pose)) for pose in poses]
    focal = tool.WIDTH / 2 / np.tan(np.radians(tool.FIELD_OF_VIEW / 2))
    intrinsics = torch.tensor([[focal, 0, tool.WIDTH / 2], [0, focal, tool.HEIGHT / 2], [0, 0, 1]], dtype=torch.float64)
    opencv = [
        torch.from_numpy(pose) @ torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)) for pose in poses
    ]
    origins, directions = pixel_rays(intrinsics, opencv[0], tool.HEIGHT, tool.WIDTH)
    points = origins + depths[0].reshape(-1, 1) * directions
    pixels, _ = project(points[None], intrinsics[None, None], opencv[1][None, None])
    grid = 2 * pixels[0] / torch.tensor([tool.WIDTH, tool.HEIGHT]) - 1
    inside = (grid[0].abs() < 0.97).all(-1)
    inverse = F.grid_sample(1 / depths[1][None, None], grid[:, None], align_corners=False)[0, 0, 0]
    world_to_camera = torch.linalg.inv(opencv[1])
    there = points @ world_to_camera[2, :3] + world_to_camera[2, 3]
    difference = (there - 1 / inverse)[inside]
    assert inside.float().mean() > 0.6
    assert difference.abs().median() < 0.02
    # Where they differ by more, the ball hides the point: nothing hovers before what the second camera sees.
    assert (difference > 0.5).float().mean() > 0.01
    assert (difference < -0.2).float().mean() < 0.03  # the silhouette, between pixels
