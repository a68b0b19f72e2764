"""Learning to render with the trainer that knows nothing of it: items, loss, teacher, resuming."""

import copy

import pytest
import torch
from ball_scenes import make_scene
from safetensors.torch import load_file
from tiny_gnt import SIZE, batch, tiny
from torch.utils.data import default_collate

from vitrify import Recipe, convert_, recipes
from vitrify.data import DeterministicDataset
from vitrify.errors import InputError
from vitrify.nvs import RayDataset, RenderTask
from vitrify.nvs.model import Rendered
from vitrify.nvs.task import psnr, ray_batch, recoloured, squared_error
from vitrify.train import TrainConfig, finetune, read_metrics


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scenes(count=2, views=6):
    return [make_scene(k, views=views, **SIZE) for k in range(count)]


def quick(**changes):
    return TrainConfig(**{"epochs": 2, "batch_size": 2, "lr": 1e-3, "weight_decay": 0.0, "log_every": 1, **changes})


def task(config, **changes):
    held_out = RayDataset([make_scene(9, views=6, **SIZE)], 32, 3, targets=[2], train=False)
    return RenderTask(config, RayDataset(scenes(), 16, 3, **changes), held_out)


def test_items_are_pixels_of_the_target_and_views_that_are_not():
    data = RayDataset(scenes(), rays=768, sources=3, train=False)
    assert len(data) == 12
    rays, colours = data[8]
    scene = make_scene(1, **SIZE, views=6)
    torch.testing.assert_close(colours, scene.views[2].rgb().flatten(1).mT)
    poses = [view.camera_to_world for view in scene.views]
    used = [next(i for i, pose in enumerate(poses) if torch.equal(pose, mine)) for mine in rays.camera_to_world]
    assert sorted(used) == [1, 3, 4] or sorted(used) == [0, 1, 3]
    assert torch.equal(rays.images[0], scene.views[used[0]].rgb())


def test_random_sources_are_near_ones_and_never_the_target():
    torch.manual_seed(0)
    data = RayDataset(scenes(1, views=9), rays=4, sources=3)
    seen = set()
    for _ in range(60):
        rays, _ = data[4]
        poses = [tuple(pose[:3, 3].tolist()) for pose in rays.camera_to_world]
        assert len(set(poses)) == 3
        seen |= set(poses)
    own = tuple(data.scenes[0].views[4].camera_to_world[:3, 3].tolist())
    assert own not in seen
    assert len(seen) == 8


def test_targets_are_never_sources():
    data = RayDataset(scenes(1), rays=4, sources=5, targets=[1, 3], train=False)
    assert len(data) == 2
    rays, _ = data[0]
    views = data.scenes[0].views
    given = {tuple(pose[:3, 3].tolist()) for pose in rays.camera_to_world}
    assert given == {tuple(views[i].camera_to_world[:3, 3].tolist()) for i in (0, 2, 4, 5)}


def test_an_item_depends_on_its_epoch_and_number_alone():
    data = DeterministicDataset(RayDataset(scenes(), 16, 3, recolour=True), seed=3)
    data.set_epoch(1)
    first = data[5]
    data[7]
    torch.rand(3)
    again = data[5]
    assert torch.equal(first[1], again[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    data.set_epoch(2)
    assert not torch.equal(first[1], data[5][1])


def test_new_colours_are_the_same_in_every_view():
    torch.manual_seed(2)
    scene = make_scene(0, **SIZE)
    rays = ray_batch(scene, scene.views[1], [1, 2])
    colours = scene.views[1].rgb().flatten(1).mT
    changed, target = recoloured(rays, colours)
    assert not torch.allclose(target, colours)
    torch.testing.assert_close(changed.images[0].flatten(1).mT, target)
    assert ((changed.images >= 0) & (changed.images <= 1)).all()
    # Equal colours stay equal, and the background goes the same way: here it is black.
    black, _ = recoloured(rays, torch.zeros(5, 3))
    assert black.background.unique().numel() <= 3


def rendered(rgb, coverage):
    empty = torch.empty(0)
    return Rendered(rgb, coverage, empty, empty, empty, None)


def test_rays_that_nobody_sees_do_not_count():
    rgb, truth = torch.zeros(1, 4, 3), torch.ones(1, 4, 3)
    rgb[0, 1] = 0.5
    coverage = torch.tensor([[0.0, 0.2, 0.0, 1.0]])
    assert squared_error(rendered(rgb, coverage), truth).item() == pytest.approx((0.25 + 1) / 2)
    assert squared_error(rendered(rgb, torch.zeros(1, 4)), truth).item() == 0


def test_psnr_is_in_decibels():
    assert psnr(torch.tensor(0.01)).item() == pytest.approx(20)
    assert psnr(torch.tensor(0.0)).item() == pytest.approx(100)


def test_measures_are_of_each_view_and_clamped():
    config = quick()
    model, (rays, colours) = tiny(), batch()
    with torch.no_grad():
        model.coarse.colour.bias.fill_(50.0)
    measured = task(config).measure(model, (rays, colours), None)
    expected = (1 - colours).square().mean((1, 2))
    torch.testing.assert_close(measured["mse"], expected)
    torch.testing.assert_close(measured["psnr"], -10 * expected.log10())


def test_both_passes_are_trained():
    config = quick()
    rays, colours = batch()
    model = tiny(fine_points=4, fine_net=True)
    loss, logs = task(config).loss(model, (rays, colours), None)
    out = model(rays)
    both = (out.rgb - colours).square().mean() + (out.coarse - colours).square().mean()
    torch.testing.assert_close(loss, both)
    assert set(logs) == {"loss", "psnr"}


@pytest.mark.parametrize("recipe", [None, Recipe(attention="taylor", keep_if_costlier=False), recipes.vitrify()])
def test_training_learns(tmp_path, recipe):
    torch.manual_seed(0)
    model = tiny()
    if recipe is not None:
        convert_(model, recipe)
    config = quick(epochs=4, lr=5e-3, warmup_epochs=0.0)
    finetune(model, task(config), config, tmp_path / "run")
    epochs = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert epochs[-1]["loss"] < 0.7 * epochs[0]["loss"]
    assert set(epochs[-1]["eval"]) == {"psnr", "mse"}


def test_a_stopped_run_ends_with_the_same_weights(tmp_path):
    class StopError(Exception):
        pass

    class Stopping(RenderTask):
        left = 8

        def loss(self, *args):
            self.left -= 1
            if self.left < 0:
                raise StopError
            return super().loss(*args)

    config = quick()
    whole = finetune(tiny(), task(config, recolour=True), config, tmp_path / "whole")
    stopping = task(config, recolour=True)
    stopping.__class__ = Stopping
    with pytest.raises(StopError):
        finetune(tiny(), stopping, config, tmp_path / "stopped")
    resumed = finetune(tiny(), task(config, recolour=True), config, tmp_path / "stopped")
    first, second = (load_file(path / "model.safetensors") for path in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_teacher_shows_its_colours(tmp_path):
    config = quick(objective="distill", distill_alpha=1.0, epochs=1)
    teacher = tiny()
    student = copy.deepcopy(teacher)
    convert_(student, Recipe(attention="taylor", keep_if_costlier=False))
    rays, colours = batch()
    loss, logs = task(config).loss(student, (rays, colours), teacher)
    torch.testing.assert_close(loss, (student(rays).rgb - teacher(rays).rgb).square().mean())
    assert set(logs) == {"loss", "psnr", "teacher_psnr"}
    finetune(student, task(config), config, tmp_path / "run", teacher=teacher)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(InputError, match="no feature loss"):
        task(quick(objective="features"))
    with pytest.raises(InputError, match="'ball0' has views 0 to 5: 40 cannot be a target"):
        RayDataset(scenes(), 16, 3, targets=[2, 40])
    with pytest.raises(InputError, match="has 3 views: none is left"):
        RayDataset(scenes(1, views=3), 16, 3, targets=[0, 1, 2])
    for changes in ({"rays": 0}, {"sources": 0}, {"repeats": 0}):
        with pytest.raises(InputError, match="must be at least 1, not 0"):
            RayDataset(scenes(), **{"rays": 16, "sources": 3, **changes})
    with pytest.raises(InputError, match="nothing to render"):
        RayDataset(scenes(), 16, 3, targets=[])
    mixed = make_scene(0, **SIZE, views=3)
    other = make_scene(0, height=24, width=40, views=1)
    views = (*mixed.views, *(type(v)("other", v.image, v.intrinsics, v.camera_to_world) for v in other.views))
    with pytest.raises(InputError, match="images of several sizes"):
        RayDataset([type(mixed)("mixed", views, 1.0, 6.0)], 16, 3)
    with pytest.raises(InputError, match="at least one source view"):
        ray_batch(mixed, mixed.views[0], [])
    with pytest.raises(InputError, match="has views 0 to 2, not 3"):
        ray_batch(mixed, mixed.views[0], [1, 3])


def test_batches_keep_their_type():
    data = RayDataset(scenes(), 16, 3, train=False)
    rays, colours = default_collate([data[0], data[1]])
    assert type(rays).__name__ == "RayBatch"
    assert rays.images.shape == (2, 3, 3, 24, 32)
    assert colours.shape == (2, 16, 3)
