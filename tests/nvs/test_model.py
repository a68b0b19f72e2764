"""The whole model: presets, what rays get that nobody sees, fine points, and what must not matter."""

import pytest
import torch
from tiny_gnt import TINY, batch, tiny

from vitrify.errors import InputError
from vitrify.nvs import create


def test_the_published_preset_has_the_published_size():
    model = create("gnt")
    blocks = model.coarse.blocks
    assert (len(blocks), model.architecture.width, model.architecture.points) == (8, 64, 64)
    assert [block.ray.place is not None for block in blocks] == [True, False] * 4
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    # Counted in the released code (configs/gnt_full: trans_depth 8, netwidth 64, ten frequencies).
    assert sizes == {"encoder": 8_877_056, "coarse": 882_691}


def test_shapes_and_what_is_reported():
    model, (rays, _) = tiny(), batch()
    out = model(rays)
    assert out.rgb.shape == (2, 20, 3)
    assert out.coarse is None
    assert out.depths.shape == (2, 20, 8)
    assert out.coverage.shape == model.depth(out).shape == (2, 20)
    assert ((out.coverage >= 0) & (out.coverage <= 1)).all()
    assert ((model.depth(out) >= rays.bounds[:, :1]) & (model.depth(out) <= rays.bounds[:, 1:])).all()


def test_batches_and_source_order_do_not_matter():
    model, (rays, _) = tiny(), batch()
    out = model(rays)
    first = rays._make(tensor[1:] for tensor in rays)
    torch.testing.assert_close(model(first).rgb, out.rgb[1:])
    order = torch.tensor([2, 0, 3, 1])
    views = {name: getattr(rays, name)[:, order] for name in ("images", "intrinsics", "camera_to_world")}
    torch.testing.assert_close(model(rays._replace(**views)).rgb, out.rgb, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(rays.select(slice(5, 9))).rgb, out.rgb[:, 5:9])


@pytest.mark.parametrize("views", [1, 2, 6])
def test_any_number_of_source_views(views):
    rays, _ = batch()
    picked = torch.arange(views) % 4
    parts = {name: getattr(rays, name)[:, picked] for name in ("images", "intrinsics", "camera_to_world")}
    assert tiny()(rays._replace(**parts)).rgb.isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"fine_points": 4}, {"fine_points": 4, "fine_net": True}])
def test_rays_that_nobody_sees_are_background_and_gradients_stay_finite(changes):
    model, (rays, colours) = tiny(**changes).train(), batch()
    origins = rays.origins.clone()
    origins[0] += torch.tensor([0.0, 1e4, 0.0])
    rays = rays._replace(origins=origins, background=torch.tensor([[0.2, 0.4, 0.6], [1.0, 1.0, 1.0]]))
    out = model(rays)
    assert (out.coverage[0] == 0).all()
    assert (out.coverage[1] > 0).any()
    for rgb in (out.rgb, out.coarse) if changes else (out.rgb,):
        assert torch.equal(rgb[0], rays.background[:1].expand(20, 3))
    (out.rgb - colours).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_inside_of_a_source_camera_nothing_is_nan():
    rays, _ = batch()
    origins = rays.camera_to_world[:, :1, :3, 3].expand(-1, 20, -1)
    out = tiny()(rays._replace(origins=origins, bounds=torch.tensor([[1e-6, 1.0], [1e-6, 1.0]])))
    assert out.rgb.isfinite().all()


@pytest.mark.parametrize("fine_net", [False, True])
def test_fine_points_are_added_where_the_first_pass_attends(fine_net):
    model, (rays, _) = tiny(fine_points=8, fine_net=fine_net), batch()
    assert (model.fine is not None) == fine_net
    out = model(rays)
    assert out.depths.shape == (2, 20, 16)
    assert (out.depths.diff(dim=-1) >= 0).all()
    assert not torch.equal(out.rgb, out.coarse)
    plain = tiny(features=8) if fine_net else tiny()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("fine.")}
    if not fine_net:
        plain.load_state_dict(weights)
        assert torch.equal(plain(rays).rgb, out.coarse)


def test_eval_is_deterministic_and_training_draws_points():
    model, (rays, _) = tiny(), batch()
    assert torch.equal(model(rays).rgb, model(rays).rgb)
    model.train()
    assert not torch.equal(model(rays).depths, model(rays).depths)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "width must be a multiple of num_heads"),
        ({"points": 3}, "points must be at least 4"),
        ({"fine_net": True}, "fine_net=True needs fine_points"),
        ({"channels": (8, 8)}, r"channels must be 3 numbers, not \(8, 8\)"),
        ({"blocks": (1, 0, 1)}, "blocks must be at least 1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"fine_points": -1}, "must not be negative"),
        ({"widht": 32}, "unknown field of a GNT 'widht': did you mean 'width'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        create("gnt_small", **changes)


def test_unknown_presets_are_refused():
    with pytest.raises(InputError, match="unknown GNT 'gnt_tiny'"):
        create("gnt_tiny")


def test_the_tiny_model_of_these_tests_differs_in_size_only():
    assert set(TINY) < set(vars(create("gnt_small").architecture))


def test_mixed_precision_gives_nearly_the_same():
    model, (rays, _) = tiny(), batch()
    exact = model(rays).rgb
    with torch.autocast("cpu", torch.bfloat16):
        out = model(rays)
        depth = model.depth(out)
    assert (out.rgb.float() - exact).abs().mean() < 0.05 * exact.std()
    assert depth.isfinite().all()
