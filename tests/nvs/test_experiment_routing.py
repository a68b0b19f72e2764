"""experiments/nvs/routing.py: which points count as what."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from vitrify.nvs import nearest_views
from vitrify.nvs.scenes_io import shipped_scenes

pytest.importorskip("skimage", reason="scikit-image is not installed")
FOLDER = Path(__file__).parents[2] / "experiments" / "nvs"
sys.path.insert(0, str(FOLDER))
routing = importlib.import_module("routing")
sys.path.remove(str(FOLDER))


def test_kinds_of_points():
    scene = shipped_scenes("held_out")[0].in_memory().shrunk(3)
    target = scene.views[0]
    sources = nearest_views(scene, target.camera_to_world, 4, exclude=[0])
    kinds = routing.kinds(scene, target, sources, 8)
    size = (target.height, target.width, 8)
    assert {kind.shape for kind in kinds.values()} == {torch.Size(size)}
    assert kinds["all"].all()
    assert torch.equal(kinds["near"][0, 0].nonzero()[:, 0], torch.arange(2))
    assert torch.equal(kinds["far"][0, 0].nonzero()[:, 0], torch.arange(6, 8))
    detail, flat = kinds["rays at detail"], kinds["flat rays"]
    assert not (detail & flat).any()
    assert 0.2 < detail.float().mean() < 0.3
    # Detail is where neighbouring pixels differ.
    steps = target.rgb().mean(0).diff(dim=1).abs()
    assert steps[detail[:, 1:, 0]].mean() > 3 * steps[flat[:, 1:, 0]].mean()
