"""Whole pictures: chunks change nothing, features are computed once, bad requests are refused."""

import pytest
import torch
from ball_scenes import make_scene
from tiny_gnt import SIZE, tiny

from vitrify.errors import InputError
from vitrify.nvs import novel_view, render, source_features
from vitrify.nvs.task import ray_batch

SCENE = make_scene(0, views=6, **SIZE)


def test_chunks_do_not_change_the_picture():
    model = tiny()
    whole, parts = (render(model, SCENE, SCENE.views[2], [1, 3, 4], chunk=chunk) for chunk in (10_000, 100))
    for name in ("rgb", "depth", "coverage"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-4, atol=1e-5)
    assert whole.rgb.shape == (3, 24, 32)
    assert whole.depth.shape == whole.coverage.shape == (24, 32)
    rays = ray_batch(SCENE, SCENE.views[2], [1, 3, 4])
    out = model(rays._make(tensor[None] for tensor in rays))
    torch.testing.assert_close(whole.rgb[:, 5, 7], out.rgb[0, 5 * 32 + 7].clamp(0, 1), rtol=1e-4, atol=1e-5)


def test_features_are_computed_once_and_can_be_shared():
    model, calls = tiny(), []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    first = render(model, SCENE, SCENE.views[2], [1, 3], chunk=100)
    assert len(calls) == 1
    features = source_features(model, SCENE, [1, 3])
    second = render(model, SCENE, SCENE.views[2], [1, 3], chunk=100, features=features)
    assert len(calls) == 2
    assert torch.equal(first.rgb, second.rgb)


def test_progress_counts_rays():
    seen = []
    render(tiny(), SCENE, SCENE.views[0], [1], chunk=300, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(300, 768), (600, 768), (768, 768)]


def test_a_camera_without_a_picture_can_be_rendered_and_the_model_keeps_its_mode():
    model = tiny().train()
    pose = SCENE.views[2].camera_to_world.clone()
    pose[0, 3] += 0.1
    picture = render(model, SCENE, novel_view(SCENE.views[2], pose), [1, 2, 3])
    assert ((picture.rgb >= 0) & (picture.rgb <= 1)).all()
    assert all(module.training for module in model.modules())
    assert torch.equal(picture.rgb, render(model, SCENE, novel_view(SCENE.views[2], pose), [1, 2, 3]).rgb)


def test_what_nobody_sees_is_background_without_depth():
    pose = SCENE.views[2].camera_to_world.clone()
    pose[1, 3] += 1e4
    picture = render(tiny(), SCENE, novel_view(SCENE.views[2], pose), [1, 2])
    assert (picture.coverage == 0).all()
    assert (picture.depth == 0).all()
    assert torch.equal(picture.rgb, SCENE.background[:, None, None].expand(3, 24, 32))


@pytest.mark.parametrize(
    ("sources", "chunk", "message"),
    [([], 10, "at least one source view"), ([6], 10, "has views 0 to 5, not 6"), ([1], 0, "chunk must be at least 1")],
)
def test_bad_requests_are_refused(sources, chunk, message):
    with pytest.raises(InputError, match=message):
        render(tiny(), SCENE, SCENE.views[0], sources, chunk=chunk)
