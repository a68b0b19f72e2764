import math

import numpy as np
import pytest
import torch
from PIL import Image

from vitrify.errors import InputError
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.selection import nearest_views


def intrinsics(width=8, height=6, focal=10.0):
    return torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])


def pose(x=0.0, angle=0.0):
    result = torch.eye(4)
    result[0, 0] = result[2, 2] = math.cos(angle)
    result[0, 2], result[2, 0] = math.sin(angle), -math.sin(angle)
    result[0, 3] = x
    return result


def view(name="a", image=None, matrix=None, camera=None):
    return View(
        name,
        torch.rand(3, 6, 8) if image is None else image,
        intrinsics() if matrix is None else matrix,
        pose() if camera is None else camera,
    )


def scene(*positions):
    return Scene("s", tuple(view(str(i), camera=pose(x)) for i, x in enumerate(positions)), 1.0, 2.0)


def test_a_view_gives_its_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    lazy = view(image=tmp_path / "a.png")
    assert (lazy.height, lazy.width) == (6, 8)
    assert torch.equal((lazy.rgb() * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))


def test_transparent_pixels_show_the_backdrop(tmp_path):
    pixels = np.zeros((6, 8, 4), dtype=np.uint8)
    pixels[0, 0] = 255, 0, 0, 51
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rgb = View("a", tmp_path / "a.png", intrinsics(), pose(), backdrop=(0.0, 0.5, 1.0)).rgb()
    assert rgb[:, 0, 0].tolist() == pytest.approx([0.2, 0.4, 0.8])
    assert rgb[:, 5, 7].tolist() == [0, 0.5, 1]


def test_grey_and_palette_images_become_rgb(tmp_path):
    for mode in ("L", "P"):
        Image.new(mode, (8, 6), 0).save(tmp_path / f"{mode}.png")
        assert view(image=tmp_path / f"{mode}.png").rgb().shape == (3, 6, 8)


@pytest.mark.parametrize("size", [(6, 8), (7, 9)])
def test_shrinking_moves_the_intrinsics_along(size):
    height, width = size
    full = view(image=torch.rand(3, height, width), matrix=intrinsics(width, height))
    half = full.shrunk(2)
    assert half.rgb().shape == (3, height // 2, width // 2) == (3, half.height, half.width)
    # The same ray, through the same relative place in either image.
    point = torch.tensor([0.1, -0.2, 1.0])
    in_full, in_half = full.intrinsics @ point, half.intrinsics @ point
    sizes = torch.tensor([width, height]), torch.tensor([half.width, half.height])
    assert torch.allclose(in_full[:2] / sizes[0], in_half[:2] / sizes[1])
    assert half.shrunk(2).rgb().mean() == pytest.approx(full.rgb().mean().item(), abs=0.15)


def test_shrinking_averages():
    image = torch.arange(3 * 6 * 8, dtype=torch.float32).reshape(3, 6, 8) / 144
    assert view(image=image).shrunk(2).rgb()[0, 0, 0] == image[0, :2, :2].mean()


def test_a_scene_in_memory_is_the_same_scene(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    lazy = Scene("s", (view(image=tmp_path / "a.png"),), 1.0, 2.0).shrunk(2)
    read = lazy.in_memory()
    assert torch.equal(read.views[0].rgb(), lazy.views[0].rgb())
    assert torch.equal(read.views[0].intrinsics, lazy.views[0].intrinsics)
    (tmp_path / "a.png").unlink()
    assert read.views[0].rgb().shape == (3, 3, 4)


@pytest.mark.parametrize("factor", [0, -1, 7])
def test_a_factor_that_leaves_no_pixel(factor):
    with pytest.raises(InputError, match=f"8 x 6: it can be shrunk by 1 to 6, not {factor}"):
        view().shrunk(factor)


def scaled():
    result = pose()
    result[:3, :3] *= 1.01
    return result


def mirrored():
    result = pose()
    result[0, 0] = -1
    return result


def not_finite():
    result = pose()
    result[1, 3] = math.nan
    return result


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        (scaled(), r"not rigid: R\^T R is off the identity by 0.02"),
        (mirrored(), "det R = -1"),
        (not_finite(), "not finite"),
        (torch.eye(4).t() + torch.tensor([[0.0], [0], [0], [1]]), "last row"),
        (torch.eye(4, dtype=torch.float64), "float64"),
        (torch.eye(3), r"\(3, 3\)"),
    ],
)
def test_a_pose_that_is_none(camera, message):
    with pytest.raises(InputError, match=f"'a'.*{message}"):
        view(camera=camera)
    with pytest.raises(InputError, match=message):
        nearest_views(scene(0), camera, 1)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (intrinsics(16, 12), r"\(8, 6\) is not near the middle of an image of 8 x 6.*about 16 x 12"),
        (intrinsics(4, 3), "about 4 x 3"),
        (intrinsics(focal=-1.0), "positive focal lengths"),
        (intrinsics(focal=math.nan), "positive focal lengths"),
        (intrinsics().t(), "fx, 0, cx"),
        (intrinsics().double(), "float64"),
    ],
)
def test_intrinsics_of_another_image(matrix, message):
    with pytest.raises(InputError, match=f"'a'.*{message}"):
        view(matrix=matrix)


def test_images_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"there is no image .*gone\.png"):
        view(image=tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputError, match=r"cannot read the image .*text\.png"):
        view(image=tmp_path / "text.png")
    with pytest.raises(InputError, match=r"\(3, H, W\) float32, not \(6, 8, 3\)"):
        view(image=torch.rand(6, 8, 3))


def test_a_truncated_image(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    lazy = view(image=tmp_path / "a.png", matrix=intrinsics(80, 60))
    with pytest.raises(InputError, match=r"cannot read the image .*a\.png"):
        lazy.rgb()


@pytest.mark.parametrize(("near", "far"), [(0, 1), (2, 1), (1, 1), (-1, 2), (1, math.inf), (math.nan, 2)])
def test_depths_that_are_none(near, far):
    with pytest.raises(InputError, match="near must be above 0"):
        Scene("s", (view(),), near, far)


def test_scenes_that_are_none():
    with pytest.raises(InputError, match="no views"):
        Scene("s", (), 1.0, 2.0)
    with pytest.raises(InputError, match="two views named 'a'"):
        Scene("s", (view(), view()), 1.0, 2.0)
    with pytest.raises(InputError, match="background"):
        Scene("s", (view(),), 1.0, 2.0, torch.tensor([0.0, 0.0, 2.0]))


def test_the_nearest_come_first():
    assert nearest_views(scene(5, 1, -2, 0.5), pose(0), 3) == [3, 1, 2]
    assert nearest_views(scene(5, 1, -2, 0.5), pose(0), 2, exclude=[3]) == [1, 2]


def test_on_a_dome_the_nearest_are_those_at_the_smallest_angle():
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(20, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cameras = [torch.eye(4) for _ in directions]
    for camera, direction in zip(cameras, directions, strict=True):
        camera[:3, 3] = torch.from_numpy(4 * direction).float()
    views = tuple(view(str(i), camera=camera) for i, camera in enumerate(cameras))
    angles = np.arccos(np.clip(directions[1:] @ directions[0], -1, 1))
    chosen = nearest_views(Scene("s", views, 2.0, 6.0), cameras[0], 5, exclude=[0])
    assert chosen == (angles.argsort()[:5] + 1).tolist()


def test_too_few_views():
    assert nearest_views(scene(0, 1), pose(0), 10) == [0, 1]
    with pytest.raises(InputError, match="must be 1 or more, not 0"):
        nearest_views(scene(0), pose(0), 0)
    with pytest.raises(InputError, match="none is left"):
        nearest_views(scene(0, 1), pose(0), 1, exclude={0, 1})


def test_select():
    assert [v.name for v in scene(0, 1, 2).select([2, 0]).views] == ["2", "0"]
