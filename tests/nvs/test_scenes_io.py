import json
import math

import folders
import numpy as np
import pytest
import torch
from folders import poses_of, random_poses

from vitrify.errors import InputError
from vitrify.nvs.colmap import find_model, load_colmap
from vitrify.nvs.scene import Scene
from vitrify.nvs.scenes_io import held_out_views, load_scene, normalised, shipped_scenes

POSES = random_poses()
WRITERS = {
    "llff": folders.write_llff,
    "blender": folders.write_blender,
    "colmap text": folders.write_colmap_text,
    "colmap binary": folders.write_colmap_binary,
}


def relative(poses):
    """Every camera as the first one sees it: what no choice of the world's frame changes."""
    return torch.linalg.inv(poses[:1].double()) @ poses.double()


@pytest.mark.parametrize("name", WRITERS)
def test_the_format_is_found(name, tmp_path):
    WRITERS[name](tmp_path, POSES)
    scene = load_scene(tmp_path)
    wanted, got = relative(torch.from_numpy(POSES)), relative(poses_of(scene))
    torch.testing.assert_close(got[:, :3, :3], wanted[:, :3, :3], rtol=0, atol=1e-6)
    # One scale for all distances, the depths included.
    scales = got[1:, :3, 3].norm(dim=1) / wanted[1:, :3, 3].norm(dim=1)
    torch.testing.assert_close(scales, scales[:1].expand_as(scales), rtol=1e-5, atol=0)
    if name in {"llff", "blender"}:
        # IBRNet's loaders widen LLFF's bounds, not those of NeRF's synthetic scenes.
        near, far = {"llff": (0.9, 1.6 * 9 / 2), "blender": (1, 6 / 2)}[name]
        assert (scene.near, scene.far) == pytest.approx((4 / 3 * near, 4 / 3 * far))
        assert scales[0] == pytest.approx(4 / 3 / 2, rel=1e-5)


def test_poses_bounds_come_first(tmp_path):
    folders.write_colmap_text(tmp_path, POSES)
    folders.write_llff(tmp_path, POSES)
    assert load_scene(tmp_path).far == pytest.approx(4 / 3 * 1.6 * 9 / 2)


@pytest.mark.parametrize("name", WRITERS)
def test_shrinking(name, tmp_path):
    WRITERS[name](tmp_path, POSES)
    assert load_scene(tmp_path, shrink=3).views[0].rgb().shape == (3, folders.HEIGHT // 3, folders.WIDTH // 3)
    with pytest.raises(InputError, match="shrunk by 1 to 12, not 13"):
        load_scene(tmp_path, shrink=13)


def test_a_normalised_scene(tmp_path):
    folders.write_blender(tmp_path, POSES)
    poses = poses_of(load_scene(tmp_path))
    mean = poses.mean(0)
    torch.testing.assert_close(mean[:3, 3], torch.zeros(3), rtol=0, atol=1e-6)
    forward = mean[:3, 2] / mean[:3, 2].norm()
    torch.testing.assert_close(forward, torch.tensor([0.0, 0, 1]), rtol=0, atol=1e-6)
    # The mean camera stands upright: its y axis has no share along x.
    assert mean[0, 1].item() == pytest.approx(0, abs=1e-6)


def test_a_scene_seen_from_all_sides_keeps_its_frame(tmp_path):
    turned = np.tile(np.eye(4), (4, 1, 1))
    for index, pose in enumerate(turned):
        angle = index * math.pi / 2
        pose[:3, :3] = [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    folders.write_blender(tmp_path, turned)
    scene = load_scene(tmp_path)
    torch.testing.assert_close(poses_of(scene), torch.from_numpy(turned).float(), rtol=0, atol=1e-6)
    assert (scene.near, scene.far) == (2, 6)


def test_bounds_of_colmap_are_widened_as_those_of_llff(tmp_path):
    folders.write_colmap_text(tmp_path, POSES)
    found = normalised(load_colmap(tmp_path, find_model(tmp_path)))
    scene = load_scene(tmp_path)
    assert (scene.near, scene.far) == pytest.approx((0.9 * found.near, 1.6 * found.far))


def test_cameras_upright_and_upside_down_have_a_frame(tmp_path):
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, :3, :3] = np.diag([-1.0, -1, 1])
    poses[1, 0, 3] = 1
    folders.write_blender(tmp_path, poses)
    got = poses_of(load_scene(tmp_path))
    torch.testing.assert_close(got[0, :3, :3], torch.eye(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(relative(got)[:, :3, :3], torch.from_numpy(poses)[:, :3, :3], rtol=0, atol=1e-6)


def test_normalising_twice_changes_nothing(tmp_path):
    folders.write_blender(tmp_path, POSES)
    scene = load_scene(tmp_path)
    again = normalised(scene)
    torch.testing.assert_close(poses_of(again), poses_of(scene), rtol=0, atol=1e-5)
    assert (again.near, again.far) == pytest.approx((scene.near, scene.far))


def test_what_is_no_scene(tmp_path):
    with pytest.raises(InputError, match="is no scene: it has neither poses_bounds"):
        load_scene(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load_scene(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, not a folder"):
        load_scene(tmp_path / "file")
    with pytest.raises(InputError, match="unknown scene 'still_lif': did you mean 'still_life'"):
        load_scene("still_lif")


def test_which_views_are_held_out(tmp_path):
    folders.write_llff(tmp_path, random_poses(20))
    assert held_out_views(load_scene(tmp_path)) == [0, 8, 16]
    folders.write_blender(tmp_path / "b", POSES)
    file = tmp_path / "b" / "transforms.json"
    content = json.loads(file.read_text())
    (tmp_path / "b" / "train").rename(tmp_path / "b" / "test")
    for frame in content["frames"]:
        frame["file_path"] = frame["file_path"].replace("train", "test")
    folders.write_images(tmp_path / "b" / "train", 5)
    content["frames"][0]["file_path"] = "./train/00"
    file.write_text(json.dumps(content))
    assert held_out_views(load_scene(tmp_path / "b")) == [1, 2, 3, 4]


@pytest.mark.parametrize(("split", "count"), [("train", 10), ("held_out", 2)])
def test_the_shipped_scenes(split, count):
    scenes = shipped_scenes(split)
    assert len(scenes) == count
    for scene in scenes:
        assert len(scene.views) == 30
        assert load_scene(scene.name).far == scene.far
        image = scene.views[7].rgb()
        assert image.shape == (3, 72, 96)
        assert image.std() > 0.1
        # Neighbouring views overlap: from each, the middle of the scene is seen near the image's middle.
        for view in scene.views:
            middle = torch.tensor([0, 0, (scene.near + scene.far) / 2, 1])
            x, y, z = view.intrinsics @ (torch.linalg.inv(view.camera_to_world) @ middle)[:3]
            assert 0 < x / z < 96
            assert 0 < y / z < 72
            assert z > 0


def test_no_scene_is_in_both_splits():
    names = [scene.name for split in ("train", "held_out") for scene in shipped_scenes(split)]
    assert len(set(names)) == len(names) == 12
    with pytest.raises(InputError, match="unknown split 'test'"):
        shipped_scenes("test")
    assert isinstance(shipped_scenes("held_out")[0], Scene)
