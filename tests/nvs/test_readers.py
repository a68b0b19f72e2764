import json
import math
import warnings

import folders
import numpy as np
import pytest
import torch
from folders import FOCAL, HEIGHT, WIDTH, poses_of, random_poses
from PIL import Image

from vitrify.errors import InputError, UnsupportedError
from vitrify.nvs.blender import load_blender
from vitrify.nvs.colmap import find_model, load_colmap
from vitrify.nvs.llff import load_llff

POSES = random_poses()


def read_colmap(folder):
    return load_colmap(folder, find_model(folder))


FORMATS = {
    "blender": (folders.write_blender, load_blender),
    "llff": (folders.write_llff, load_llff),
    "colmap text": (folders.write_colmap_text, read_colmap),
    "colmap binary": (folders.write_colmap_binary, read_colmap),
}


@pytest.mark.parametrize("name", FORMATS)
def test_poses_intrinsics_and_images_come_back(name, tmp_path):
    write, read = FORMATS[name]
    write(tmp_path / "scene", POSES)
    scene = read(tmp_path / "scene")
    assert scene.name == "scene"
    torch.testing.assert_close(poses_of(scene), torch.from_numpy(POSES).float(), rtol=0, atol=1e-6)
    wanted = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    for index, view in enumerate(scene.views):
        torch.testing.assert_close(view.intrinsics, wanted)
        assert torch.equal((view.rgb() * 255).round().byte().permute(1, 2, 0), torch.from_numpy(folders.picture(index)))


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_image_is_named(name, tmp_path):
    write, read = FORMATS[name]
    write(tmp_path, POSES)
    next(iter(tmp_path.rglob("03.png"))).unlink()
    with pytest.raises(InputError, match=r"03|has 5 poses, but .* has 4 images"):
        read(tmp_path)


# NeRF-synthetic


def test_near_and_far_of_a_blender_scene(tmp_path):
    folders.write_blender(tmp_path, POSES)
    assert (load_blender(tmp_path).near, load_blender(tmp_path).far) == (2, 6)
    folders.write_blender(tmp_path, POSES, near=0.5, far=3)
    assert (load_blender(tmp_path).near, load_blender(tmp_path).far) == (0.5, 3)


def test_the_files_of_both_splits_are_one_scene(tmp_path):
    folders.write_blender(tmp_path, POSES)
    content = json.loads((tmp_path / "transforms.json").read_text())
    (tmp_path / "transforms.json").rename(tmp_path / "transforms_train.json")
    folders.write_images(tmp_path / "test", 2)
    for frame in content["frames"]:
        frame["file_path"] = frame["file_path"].replace("train", "test")
    content["frames"] = content["frames"][:2]
    (tmp_path / "transforms_test.json").write_text(json.dumps(content))
    names = [view.name for view in load_blender(tmp_path).views]
    assert names == [*(f"train/{i:02}.png" for i in range(5)), "test/00.png", "test/01.png"]


def test_transparent_pixels_become_white(tmp_path):
    folders.write_blender(tmp_path, POSES)
    Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 0)).save(tmp_path / "train" / "00.png")
    assert torch.equal(load_blender(tmp_path).views[0].rgb(), torch.ones(3, HEIGHT, WIDTH))


def test_focal_lengths_and_centre_of_instant_ngp(tmp_path):
    folders.write_blender(tmp_path, POSES, fl_x=30.0, fl_y=31.0, cx=7.0, cy=6.5, w=WIDTH, h=HEIGHT, k1=0.0)
    wanted = torch.tensor([[30.0, 0, 7], [0, 31, 6.5], [0, 0, 1]])
    assert torch.equal(load_blender(tmp_path).views[0].intrinsics, wanted)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"w": 2 * WIDTH}, f"w is 32, but .* is {WIDTH} x {HEIGHT}"),
        ({"fl_x": 30, "cx": WIDTH}, "principal point"),
        ({"fl_x": "30"}, "fl_x must be a finite number, not '30'"),
        ({"camera_angle_x": math.inf}, "camera_angle_x must be a finite number, not inf"),
        ({"camera_angle_x": math.nan}, "camera_angle_x must be a finite number, not nan"),
        ({"far": 10**400}, "far must be a finite number, not 1000"),
        ({"frames": [{"file_path": ""}]}, "must name an image, not ''"),
        ({"frames": [{"file_path": None}]}, "must name an image, not None"),
        ({"camera_angle_x": 0.0}, "positive focal lengths"),
        ({"frames": [{"transform_matrix": []}]}, "'frames' must be a list"),
        ({"frames": []}, "no views"),
        ({"near": 7}, "near must be above 0 and below far"),
    ],
)
def test_transforms_that_are_wrong(extra, message, tmp_path):
    folders.write_blender(tmp_path, POSES, **extra)
    with pytest.raises(InputError, match=message):
        load_blender(tmp_path)


def test_blender_files_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match=r"has none of transforms\.json"):
        load_blender(tmp_path)
    (tmp_path / "transforms.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*transforms\.json"):
        load_blender(tmp_path)
    (tmp_path / "transforms.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"cannot read .*transforms\.json: maximum recursion"):
        load_blender(tmp_path)
    (tmp_path / "transforms.json").write_text("[]")
    with pytest.raises(InputError, match="object with frames, not list"):
        load_blender(tmp_path)
    folders.write_blender(tmp_path, POSES, k1=0.1)
    with pytest.raises(UnsupportedError, match=r"train/00\.png.* has lens distortion"):
        load_blender(tmp_path)


def change_pose(tmp_path, pose):
    content = json.loads((tmp_path / "transforms.json").read_text())
    content["frames"][2]["transform_matrix"] = pose
    (tmp_path / "transforms.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        ((2 * np.eye(4)).tolist(), "last row"),
        (np.diag([1.1, 1.1, 1.1, 1]).tolist(), "not rigid"),
        (np.eye(3).tolist(), r"is \(3, 3\), not \(4, 4\)"),
        ([["x"] * 4] * 4, "4 x 4 numbers"),
        ([[10**400] * 4] * 4, "4 x 4 numbers"),
        (None, r"not \(4, 4\)"),
    ],
)
def test_a_pose_of_transforms_that_is_none(pose, message, tmp_path):
    folders.write_blender(tmp_path, POSES)
    change_pose(tmp_path, pose)
    with pytest.raises(InputError, match=f"train/02.*{message}"):
        load_blender(tmp_path)


# LLFF


def test_bounds_of_llff_are_the_extremes(tmp_path):
    folders.write_llff(tmp_path, POSES)
    rows = np.load(tmp_path / "poses_bounds.npy")
    rows[1, 15], rows[3, 16] = 1.5, 20
    np.save(tmp_path / "poses_bounds.npy", rows)
    scene = load_llff(tmp_path)
    assert (scene.near, scene.far) == (1.5, 20)


def test_llff_images_that_are_smaller_than_their_poses_say(tmp_path):
    folders.write_llff(tmp_path, POSES, scale=4)
    assert load_llff(tmp_path).views[0].intrinsics[0].tolist() == [FOCAL, 0, WIDTH / 2]


def test_llff_shrinks_or_takes_the_smaller_copies(tmp_path):
    folders.write_llff(tmp_path, POSES)
    shrunk = load_llff(tmp_path, shrink=2)
    assert (shrunk.views[0].height, shrunk.views[0].width) == (HEIGHT // 2, WIDTH // 2)
    folders.write_images(tmp_path / "images_2", 5, HEIGHT // 2, WIDTH // 2)
    copies = load_llff(tmp_path, shrink=2)
    assert copies.views[0].image == tmp_path / "images_2" / "00.png"
    assert torch.equal(copies.views[0].intrinsics, shrunk.views[0].intrinsics)


def test_llff_folders_that_are_wrong(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*poses_bounds\.npy"):
        load_llff(tmp_path)
    folders.write_llff(tmp_path, POSES, images="images_4")
    with pytest.raises(InputError, match=r"no folder images/ \(smaller copies that are there: images_4\)"):
        load_llff(tmp_path)
    folders.write_images(tmp_path / "images", 5, HEIGHT, HEIGHT)
    with pytest.raises(InputError, match=r"00\.png is 12 x 12 pixels, its pose is for 16 x 12"):
        load_llff(tmp_path)
    folders.write_images(tmp_path / "images", 6)
    with pytest.raises(InputError, match=r"has 5 poses, but .* has 6 images"):
        load_llff(tmp_path)
    np.save(tmp_path / "poses_bounds.npy", np.zeros((5, 15)))
    with pytest.raises(InputError, match=r"\(views, 17\), not \(5, 15\)"):
        load_llff(tmp_path)
    for rows in (np.zeros((0, 17)), np.zeros(())):
        np.save(tmp_path / "poses_bounds.npy", rows)
        with pytest.raises(InputError, match=r"\(views, 17\), not "):
            load_llff(tmp_path)
    np.save(tmp_path / "poses_bounds.npy", np.array([["a"] * 17]))
    with pytest.raises(InputError, match="an array of numbers"):
        load_llff(tmp_path)
    (tmp_path / "poses_bounds.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(InputError, match="cannot read"):
        load_llff(tmp_path)
    np.savez(tmp_path / "poses_bounds.npy", a=np.zeros(1))
    (tmp_path / "poses_bounds.npy.npz").replace(tmp_path / "poses_bounds.npy")
    with pytest.raises(InputError, match="an archive"):
        load_llff(tmp_path)


def test_nan_in_llff(tmp_path):
    folders.write_llff(tmp_path, POSES)
    rows = np.load(tmp_path / "poses_bounds.npy")
    np.save(tmp_path / "poses_bounds.npy", np.where(np.arange(17) == 4, np.nan, rows))
    with pytest.raises(InputError, match="its pose is for 16 x nan"):
        load_llff(tmp_path)
    np.save(tmp_path / "poses_bounds.npy", np.where(np.isin(np.arange(17), (4, 9)), 0, rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="its pose is for 0 x 0"):
            load_llff(tmp_path)


# COLMAP


@pytest.mark.parametrize("name", ["colmap text", "colmap binary"])
def test_near_and_far_are_the_depths_of_the_points(name, tmp_path):
    write, read = FORMATS[name]
    write(tmp_path, POSES)
    _, points = folders.colmap_contents(POSES)
    # The last image sees no point.
    depths = [points @ pose[2, :3] + pose[2, 3] for pose in np.linalg.inv(POSES[:-1])]
    wanted = np.percentile(depths, [0.1, 99.9], axis=1)
    scene = read(tmp_path)
    assert scene.near == pytest.approx(wanted[0].min())
    assert scene.far == pytest.approx(wanted[1].max())


@pytest.mark.parametrize("place", ["sparse/0", "sparse", "."])
def test_where_a_colmap_model_may_be(place, tmp_path):
    folders.write_colmap_text(tmp_path, POSES, model=place)
    assert find_model(tmp_path) == tmp_path / place
    assert len(read_colmap(tmp_path).views) == len(POSES)
    assert find_model(tmp_path / "images") is None


def test_names_with_spaces(tmp_path):
    folders.write_colmap_text(tmp_path, POSES)
    (tmp_path / "images" / "00.png").rename(tmp_path / "images" / "first one.png")
    file = tmp_path / "sparse" / "0" / "images.txt"
    file.write_text(file.read_text().replace("00.png", "first one.png"))
    assert "first one.png" in [view.name for view in read_colmap(tmp_path).views]


@pytest.mark.parametrize(
    ("camera", "wanted"),
    [
        (("SIMPLE_PINHOLE", 21.0, 8.0, 6.0), [21, 21]),
        (("PINHOLE", 21.0, 22.0, 8.0, 6.0), [21, 22]),
        (("SIMPLE_RADIAL", 21.0, 8.0, 6.0, 0.0), [21, 21]),
        (("RADIAL", 21.0, 8.0, 6.0, 0.0, 0.0), [21, 21]),
        (("OPENCV", 21.0, 22.0, 8.0, 6.0, 0.0, 0.0, 0.0, 0.0), [21, 22]),
    ],
)
def test_camera_models_without_distortion(camera, wanted, tmp_path):
    folders.write_colmap_text(tmp_path, POSES, camera)
    assert read_colmap(tmp_path).views[0].intrinsics.diagonal()[:2].tolist() == wanted


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        (("SIMPLE_RADIAL", 21.0, 8.0, 6.0, 0.01), "SIMPLE_RADIAL with {'k': 0.01}: undistort"),
        (("OPENCV_FISHEYE", 21.0, 22.0, 8.0, 6.0, 0.0, 0.0, 0.0, 0.0), "OPENCV_FISHEYE"),
    ],
)
def test_lenses_with_distortion_are_refused(camera, message, tmp_path):
    folders.write_colmap_text(tmp_path, POSES, camera)
    with pytest.raises(UnsupportedError, match=message):
        read_colmap(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("cameras.txt", "PINHOLE", "PINHOLE2", "no camera model 'PINHOLE2'"),
        ("cameras.txt", "PINHOLE 16 12 20.0", "PINHOLE 16 12", "damaged"),
        ("cameras.txt", "16 12", "32 24", r"is 16 x 12, but camera 7 is for 32 x 24"),
        ("cameras.txt", "7 PINHOLE", "8 PINHOLE", "has the camera 7, which is missing"),
        ("images.txt", " 7 00.png", "", "damaged"),
        ("points3D.txt", "10 ", "x ", "damaged"),
    ],
)
def test_text_models_that_are_wrong(file, old, new, message, tmp_path):
    folders.write_colmap_text(tmp_path, POSES)
    path = tmp_path / "sparse" / "0" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(InputError, match=message):
        read_colmap(tmp_path)


def test_a_quaternion_that_is_none(tmp_path):
    folders.write_colmap_text(tmp_path, POSES)
    path = tmp_path / "sparse" / "0" / "images.txt"
    lines = path.read_text().splitlines()
    fields = lines[1].split()
    lines[1] = " ".join([fields[0], "2.0", *fields[2:]])
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"the quaternion of '04\.png' has the length 2"):
        read_colmap(tmp_path)


@pytest.mark.parametrize("file", ["cameras", "images", "points3D"])
def test_a_missing_file_of_a_model(file, tmp_path):
    folders.write_colmap_text(tmp_path, POSES)
    (tmp_path / "sparse" / "0" / f"{file}.txt").unlink()
    assert (find_model(tmp_path) is None) == (file == "cameras")
    with pytest.raises(InputError, match=f"cannot read .*{file}.txt"):
        load_colmap(tmp_path, tmp_path / "sparse" / "0")


@pytest.mark.parametrize("file", ["cameras.bin", "images.bin", "points3D.bin"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_binary_models(file, share, tmp_path):
    folders.write_colmap_binary(tmp_path, POSES)
    path = tmp_path / "sparse" / "0" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=f"{file} is damaged"):
        read_colmap(tmp_path)


def test_a_model_without_points(tmp_path):
    folders.write_colmap_text(tmp_path, POSES)
    (tmp_path / "sparse" / "0" / "points3D.txt").write_text("# none\n")
    with pytest.raises(InputError, match="near and far are unknown"):
        read_colmap(tmp_path)
