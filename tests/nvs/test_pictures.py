import io

import numpy as np
import pytest
import torch
from PIL import Image

from vitrify.errors import InputError
from vitrify.nvs import pictures
from vitrify.nvs.scene import Scene, View

SCENE = Scene(
    "s", (View("a", torch.rand(3, 4, 4), torch.tensor([[4.0, 0, 2], [0, 4, 2], [0, 0, 1]]), torch.eye(4)),), 1, 4
)


def test_pngs_come_back(tmp_path):
    colours, depth = torch.rand(3, 5, 7), torch.rand(5, 7)
    for name, picture, step in (("a.png", colours, 1 / 255), ("b.png", depth, 1 / 65535)):
        (tmp_path / name).write_bytes(pictures.png(picture))
        assert (pictures.read_png(tmp_path / name) - picture).abs().max() <= step / 2 + 1e-7
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"cannot read .*c\.png"):
        pictures.read_png(tmp_path / "c.png")


def test_errors_are_black_where_there_is_none_and_white_at_a_quarter():
    truth = torch.full((3, 1, 4), 0.5)
    drawn = pictures.error_map(truth + torch.tensor([0, 0.25 / 3, 0.25, 0.5]), truth)
    assert drawn[:, 0].T.tolist() == [
        [0, 0, 0],
        [pytest.approx(1), pytest.approx(0, abs=1e-6), 0],
        [1, 1, 1],
        [1, 1, 1],
    ]


def test_depth_is_even_in_inverse_depth():
    depth = torch.tensor([[1.0, 4.0, 1.6, 0.5, 9.0, 0.0]])
    assert pictures.depth_map(depth, SCENE)[0].tolist() == pytest.approx([1, 0, 0.5, 1, 0, 0])


def test_an_animation_has_all_frames_enlarged():
    frames = [torch.full((3, 36, 48), value) for value in (0.0, 0.5, 1.0)]
    with Image.open(io.BytesIO(pictures.gif(frames, frames_per_second=10))) as animation:
        assert (animation.n_frames, animation.size, animation.info["duration"]) == (3, (384, 288), 100)
        assert animation.info["loop"] == 0
        values = []
        for index in range(3):
            animation.seek(index)
            values.append(int(np.asarray(animation.convert("L"))[0, 0]))
    assert values == pytest.approx([0, 128, 255], abs=1)


def test_pictures_in_a_row():
    row = pictures.side_by_side(torch.zeros(3, 2, 3), torch.ones(2, 4))
    assert row.shape == (3, 2, 7)
    assert row[:, 0].sum(1).tolist() == [4, 4, 4]
