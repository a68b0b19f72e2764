import pytest
import torch
from ball_scenes import look_at, make_scene

from vitrify.errors import InputError
from vitrify.nvs.paths import fly_through
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.scenes_io import load_scene

INTRINSICS = torch.tensor([[4.0, 0, 2], [0, 4, 2], [0, 0, 1]])


def scene_at(positions):
    target = torch.tensor([0.0, 0, 3])
    poses = [look_at(torch.tensor(position), target) for position in positions]
    return Scene("s", tuple(View(str(i), torch.zeros(3, 4, 4), INTRINSICS, pose) for i, pose in enumerate(poses)), 1, 5)


def test_every_pose_is_rigid_and_the_path_is_closed_and_smooth():
    poses = fly_through(load_scene("market"), 64)
    rotation = poses[:, :3, :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(64, 3, 3), atol=1e-5, rtol=0)
    assert torch.linalg.det(rotation).min() > 0.999
    steps = (poses[:, :3, 3] - poses.roll(1, 0)[:, :3, 3]).norm(dim=1)
    turns = (rotation - rotation.roll(1, 0)).norm(dim=(1, 2))
    assert steps.max() < 4 * steps.mean()
    assert turns.max() < 5 * turns.mean()


def test_the_path_goes_through_cameras_at_the_rim():
    ring = [(x, y, 0.0) for x, y in ((1.0, 0.0), (0.0, 1.1), (-1.2, 0.0), (0.0, -1.3))]
    scene = scene_at([(0.1, 0.1, 0.0), *ring])
    poses = fly_through(scene, 4)
    wanted = {tuple(round(v, 4) for v in position) for position in ring}
    found = {tuple(round(v, 4) + 0.0 for v in pose[:3, 3].tolist()) for pose in poses}
    assert len(wanted & found) >= 3


@pytest.mark.parametrize("count", [1, 2])
def test_few_cameras(count):
    poses = fly_through(scene_at([(0.0, 0.0, 0.0), (0.5, 0.1, 0.0)][:count]), 7)
    assert poses.isfinite().all()
    assert poses[:, 0, 3].min() >= -0.1
    assert poses[:, 0, 3].max() <= 0.6
    for pose in poses:
        View("v", torch.zeros(3, 4, 4), INTRINSICS, pose)  # rigid


def test_no_frames():
    with pytest.raises(InputError, match="1 frame or more, not 0"):
        fly_through(make_scene(), 0)
