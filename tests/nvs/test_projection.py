"""Sampling the source views: the right pixels, only inside of the image and in front of the camera, always finite."""

import torch
from ball_scenes import colours_and_depths, make_scene
from tiny_gnt import SIZE, batch

from vitrify.nvs.projection import project, sample
from vitrify.nvs.rays import pixel_rays
from vitrify.nvs.task import ray_batch


def test_points_project_to_the_pixels_they_came_from():
    view = make_scene(0, **SIZE).views[1]
    origins, directions = pixel_rays(view.intrinsics, view.camera_to_world, view.height, view.width)
    points = (origins + 2.5 * directions)[None]
    pixels, in_front = project(points, view.intrinsics[None, None], view.camera_to_world[None, None])
    assert in_front.all()
    number = torch.arange(view.height * view.width)
    expected = torch.stack([number % view.width, number // view.width], -1) + 0.5
    torch.testing.assert_close(pixels[0, 0], expected, rtol=1e-4, atol=1e-3)


def test_behind_the_camera_is_finite_and_never_in_front():
    view = make_scene(0, **SIZE).views[0]
    origins, directions = pixel_rays(view.intrinsics, view.camera_to_world, view.height, view.width)
    for depth in (-2.0, -1e-12, 0.0):
        pixels, in_front = project(
            (origins + depth * directions)[None], view.intrinsics[None, None], view.camera_to_world[None, None]
        )
        assert pixels.isfinite().all()
        assert depth == -1e-12 or not in_front.any()


def one_target(depths_of=None):
    """The middle view of a scene from its neighbours; depths (1, R, 1): where its rays meet something."""
    scene = make_scene(3, views=7, height=48, width=64)
    target = scene.views[3]
    rays = ray_batch(scene, target, [2, 4])
    colours, depths = colours_and_depths(rays.origins, rays.directions, 3)
    rays = rays._make(tensor[None] for tensor in rays)
    features = torch.zeros(1, 2, 1, 12, 16)
    return rays, features, colours, depths[None, :, None]


def test_the_surface_has_the_targets_colour_in_the_source_views():
    rays, features, colours, depths = one_target()
    at_surface = sample(rays, features, depths)
    elsewhere = sample(rays, features, depths * 0.8)
    errors = []
    for samples in (at_surface, elsewhere):
        difference = (samples.features[:, 0, :, :3] - colours[:, None]).abs().mean(-1)
        errors.append(difference[samples.valid[:, 0]].median())
    assert at_surface.valid.float().mean() > 0.8
    assert errors[0] < 0.01
    assert errors[1] > 5 * errors[0]


def test_a_source_camera_that_is_the_target_sees_its_own_pixels():
    scene = make_scene(0, **SIZE)
    rays = ray_batch(scene, scene.views[2], [2])
    rays = rays._make(tensor[None] for tensor in rays)
    samples = sample(rays, torch.zeros(1, 1, 1, 6, 8), torch.full((1, 24 * 32, 3), 2.0))
    expected = scene.views[2].rgb().flatten(1).mT
    inside = samples.valid[:, 0, 0]
    assert inside.view(24, 32)[1:-1, 1:-1].all()  # rounding may put the centres of the outermost pixels outside
    torch.testing.assert_close(samples.features[inside][:, 0, 0, :3], expected[inside], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(samples.angles[..., 3], torch.ones(24 * 32, 3, 1))


def test_features_of_a_coarser_map_line_up_at_the_corners():
    rays, _, _, depths = one_target()
    ramp = torch.linspace(0, 1, 16).expand(1, 2, 1, 12, 16)
    samples = sample(rays, ramp, depths)
    pixels, _ = project((rays.origins + depths * rays.directions), rays.intrinsics, rays.camera_to_world)
    expected = ((pixels[0, ..., 0] - 0.5) / 63).mT
    valid = samples.valid[:, 0]
    torch.testing.assert_close(samples.features[:, 0, :, 3][valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_outside_of_the_image_nothing_is_valid_and_the_features_are_zeros():
    rays, _ = batch()
    moved = rays._replace(origins=rays.origins + torch.tensor([1e4, 0, 0]))
    samples = sample(moved, torch.ones(2, 4, 1, 12, 16), torch.rand(2, 20, 5) + 1)
    assert not samples.valid.any()
    assert (samples.features == 0).all()
    assert all(tensor.isfinite().all() for tensor in samples)


def test_angles_are_a_unit_vector_and_a_cosine():
    rays, _ = batch()
    samples = sample(rays, torch.ones(2, 4, 1, 12, 16), torch.rand(2, 20, 5) + 1)
    torch.testing.assert_close(samples.angles[..., :3].norm(dim=-1), torch.ones(40, 5, 4))
    point, to_target = samples.points[7, 2], None
    to_target = torch.nn.functional.normalize(rays.origins[0, 7] - point, dim=0)
    to_source = torch.nn.functional.normalize(rays.camera_to_world[0, 3, :3, 3] - point, dim=0)
    torch.testing.assert_close(samples.angles[7, 2, 3, 3], to_target @ to_source)
    expected = torch.nn.functional.normalize(to_target - to_source, dim=0)
    torch.testing.assert_close(samples.angles[7, 2, 3, :3], expected, rtol=1e-4, atol=1e-4)
