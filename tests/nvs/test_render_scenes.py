"""The tool that rendered the shipped scenes: the same images again, and cameras where the readers say that they are."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrify.nvs.blender import load_blender

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


@pytest.mark.parametrize("place", [[0.0, 0.2, 0.6], [-0.7, 0.4, 0.1], [0.6, -0.3, 1.0]])
def test_a_ball_is_seen_where_the_readers_say(tool, tmp_path, place):
    """Focal length, principal point, pose and axes, to a tenth of a pixel of 96 x 72."""
    import mitsuba  # noqa: PLC0415

    scene = mitsuba.load_dict({"type": "scene", "ball": {"type": "sphere", "center": place, "radius": 0.1}})
    for number, pose in enumerate(tool.cameras(np.random.default_rng(0), 3)):
        Image.new("RGB", (tool.WIDTH, tool.HEIGHT)).save(tmp_path / f"{number}.png")
        frame = {"file_path": str(number), "transform_matrix": pose.tolist()}
        content = {"camera_angle_x": np.radians(tool.FIELD_OF_VIEW), "frames": [frame]}
        (tmp_path / "transforms.json").write_text(json.dumps(content))
        view = load_blender(tmp_path).views[0]
        x, y, z = view.intrinsics @ (torch.linalg.inv(view.camera_to_world) @ torch.tensor([*place, 1]))[:3]
        integrator = mitsuba.load_dict({"type": "aov", "aovs": "distance:depth"})
        camera = tool.sensor(pose, 64)
        share = np.array(mitsuba.render(scene, sensor=camera, integrator=integrator, spp=64))[..., 0]
        rows, columns = np.indices(share.shape) + 0.5
        assert np.average(columns, weights=share) == pytest.approx((x / z).item(), abs=0.1)
        assert np.average(rows, weights=share) == pytest.approx((y / z).item(), abs=0.1)
        # The nearest point of the ball; the axis of the camera need not go through it.
        assert tool.depth(scene, pose).min() == pytest.approx(z.item() - 0.1, abs=0.02)
