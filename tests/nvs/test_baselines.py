import pytest
import torch
from ball_scenes import make_scene

from vitrify.errors import InputError
from vitrify.nvs.baselines import mean_on_a_plane, nearest_source
from vitrify.nvs.metrics import psnr
from vitrify.nvs.render import novel_view
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.scenes_io import load_scene
from vitrify.nvs.selection import nearest_views


def wall(shift=0.0, name="a", colours=None, height=24, width=32):
    """A view, along z, of a smoothly coloured wall at z = 3."""
    intrinsics = torch.tensor([[40.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]])
    pose = torch.eye(4)
    pose[0, 3] = shift
    x = (torch.arange(width) + 0.5 - width / 2) / 40 * 3 + shift
    y = (torch.arange(height) + 0.5 - height / 2) / 40 * 3
    image = torch.stack([x.sin() * y[:, None].cos(), (2 * x).cos() + 0 * y[:, None], x + y[:, None]])
    return View(name, (image * 0.2 + 0.5).clamp(0, 1) if colours is None else colours, intrinsics, pose)


def scene_of(*views):
    return Scene("wall", views, 1.0, 9.0, torch.tensor([0.0, 1.0, 0.0]))


def test_the_nearest_source_is_copied():
    scene = make_scene()
    sources = nearest_views(scene, scene.views[4].camera_to_world, 3, exclude=[4])
    assert torch.equal(nearest_source(scene, scene.views[4], sources), scene.views[sources[0]].rgb())


def test_a_nearest_source_of_another_size_is_scaled():
    scene, half = make_scene(), make_scene().shrunk(2)
    assert torch.allclose(nearest_source(scene, half.views[0], [1]), half.views[1].rgb(), atol=0.15)
    assert nearest_source(scene, half.views[0], [1]).shape == (3, 18, 24)


def test_a_wall_is_rendered_from_its_plane():
    # The exact wall is between two of the planes, so that interpolation errors remain.
    target = wall(0.05)
    picture = mean_on_a_plane(scene_of(wall(-0.2), wall(0.1, "b"), wall(0.3, "c")), target, [0, 1, 2])
    inner = (slice(None), slice(None), slice(4, -4))
    assert (picture - target.rgb())[inner].abs().max() < 0.01
    assert psnr(picture, target.rgb()) > 35


def test_pixels_that_no_source_sees_are_background():
    # The target looks half past what the sources see.
    picture = mean_on_a_plane(scene_of(wall(0.0), wall(0.1, "b")), wall(1.6), [0, 1])
    assert torch.equal(picture[:, :, -4:], torch.tensor([0.0, 1, 0])[:, None, None].expand(3, 24, 4))
    assert picture.isfinite().all()


def test_cameras_that_look_away_see_nothing():
    behind = wall(0.0)
    turned = torch.diag(torch.tensor([-1.0, 1, -1, 1]))
    views = [View(name, behind.image, behind.intrinsics, turned) for name in "ab"]
    picture = mean_on_a_plane(scene_of(*views), wall(0.0), [0, 1])
    assert torch.equal(picture, torch.tensor([0.0, 1, 0])[:, None, None].expand_as(picture))


def test_the_truth_of_the_target_is_not_used():
    scene = make_scene()
    blank = novel_view(scene.views[4], scene.views[4].camera_to_world)
    for renderer in (nearest_source, mean_on_a_plane):
        assert torch.equal(renderer(scene, blank, [3, 5]), renderer(scene, scene.views[4], [3, 5]))


def test_the_plane_that_the_sources_agree_on_beats_fixed_ones():
    scene = load_scene("market").in_memory()
    target = scene.views[8]
    sources = nearest_views(scene, target.camera_to_world, 6, exclude=[8])
    chosen = psnr(mean_on_a_plane(scene, target, sources), target.rgb())
    for depth in (1.1 * scene.near, 0.9 * scene.far):
        fixed = Scene("fixed", scene.views, depth, depth * 1.001, scene.background)
        assert chosen > psnr(mean_on_a_plane(fixed, target, sources), target.rgb()) + 1
    assert chosen > psnr(nearest_source(scene, target, sources), target.rgb()) + 1


def test_one_source_is_seen_on_the_middle_plane():
    # Half way between 1 and 9 in inverse depth is 1.8, where a shift by 0.1 is 2.2 pixels.
    picture = mean_on_a_plane(scene_of(wall(0.1)), wall(0.0), [0])
    moved = wall(0.1).rgb().roll(2, 2)
    assert (picture - moved)[:, :, 4:].abs().mean() < 0.5 * (picture - wall(0.1).rgb())[:, :, 4:].abs().mean()


@pytest.mark.parametrize("renderer", [nearest_source, mean_on_a_plane])
def test_no_source(renderer):
    with pytest.raises(InputError, match="no source view"):
        renderer(make_scene(), make_scene().views[0], [])
