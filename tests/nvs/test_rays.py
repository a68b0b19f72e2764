"""Rays go through pixel centres; points lie between the bounds, evenly in 1/depth, or where weights are."""

import pytest
import torch
from ball_scenes import look_at

from vitrify.nvs.rays import pixel_rays, refine, spread

INTRINSICS = torch.tensor([[50.0, 0, 16.2], [0, 45.0, 11.9], [0, 0, 1]])
BOUNDS = torch.tensor([[1.0, 6.0], [2.0, 3.0]])


def test_a_point_on_a_ray_is_seen_at_its_pixels_centre():
    pose = look_at(torch.tensor([1.0, -0.5, 0.3]), torch.tensor([0.0, 0.2, 4.0]))
    origins, directions = pixel_rays(INTRINSICS, pose, 24, 32)
    in_camera = (3.7 * directions + origins - pose[:3, 3]) @ pose[:3, :3]
    torch.testing.assert_close(in_camera[:, 2], torch.full((24 * 32,), 3.7))
    pixels = (in_camera @ INTRINSICS.mT)[:, :2] / in_camera[:, 2:]
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(32), indexing="ij")
    torch.testing.assert_close(pixels, torch.stack([columns, rows], -1).flatten(0, 1) + 0.5, rtol=1e-5, atol=1e-4)


def test_some_pixels_are_those_of_all():
    every = pixel_rays(INTRINSICS, torch.eye(4), 24, 32)
    some = pixel_rays(INTRINSICS, torch.eye(4), 24, 32, torch.tensor([0, 31, 32, 767]))
    for whole, part in zip(every, some, strict=True):
        assert torch.equal(whole[[0, 31, 32, 767]], part)


def test_depths_are_even_in_inverse_depth():
    depths = spread(BOUNDS, 5, 9, jitter=False)
    assert depths.shape == (2, 5, 9)
    torch.testing.assert_close(depths[:, 0, 0], BOUNDS[:, 0])
    torch.testing.assert_close(depths[:, 0, -1], BOUNDS[:, 1])
    steps = (1 / depths).diff(dim=-1)
    torch.testing.assert_close(steps, steps[..., :1].expand_as(steps), rtol=1e-4, atol=1e-6)


def test_jittered_depths_stay_in_their_own_intervals():
    torch.manual_seed(0)
    even, jittered = (spread(BOUNDS, 400, 9, jitter=jitter) for jitter in (False, True))
    assert (jittered.diff(dim=-1) >= 0).all()
    middles = (even[..., 1:] + even[..., :-1]) / 2
    assert (jittered[..., 1:] >= middles).all()
    assert (jittered[..., :-1] <= middles).all()
    assert (jittered.std(1)[..., 1:-1] > 0.1 * even[:, 0].diff(dim=-1)[..., 1:]).all()


@pytest.mark.parametrize("jitter", [False, True])
def test_refined_depths_gather_where_the_weights_are(jitter):
    depths = spread(BOUNDS, 3, 16, jitter=False)
    weights = torch.zeros_like(depths)
    weights[..., 6] = 1
    refined = refine(depths, weights, 32, jitter=jitter)
    assert refined.shape == (2, 3, 48)
    assert (refined.diff(dim=-1) >= 0).all()
    near = (refined >= depths[..., 5:6]) & (refined <= depths[..., 7:8])
    assert (near.sum(-1) >= 32).all()


def test_refining_without_weights_stays_finite_and_in_bounds():
    depths = spread(BOUNDS, 3, 16, jitter=False)
    refined = refine(depths, torch.zeros_like(depths), 8, jitter=False)
    assert refined.isfinite().all()
    assert (refined >= BOUNDS[:, 0, None, None]).all()
    assert (refined <= BOUNDS[:, 1, None, None] + 1e-5).all()
