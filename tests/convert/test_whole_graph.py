"""A converted model is one graph: torch.compile(fullgraph=True) takes it whole, and its outputs stay equal."""

import shutil

import pytest
import timm
import torch

from vitrify import convert_, pack_, recipes

CASES = [
    ("deit_base_patch16_224", "taylor", False),
    ("deit_base_patch16_224", "shiftaddvit", True),
    ("deit_base_patch16_224", "vitrify", True),
    ("pvt_v2_b0", "vitrify", True),
    ("levit_128s", "taylor", False),
    ("mobilevit_xxs", "taylor", False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe", "packed"), CASES, ids=str)
def test_one_graph(name, recipe, packed):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = timm.create_model(name).eval()
    assert convert_(model, recipes.get(recipe)).changed
    if packed:
        assert pack_(model) > 0
    images = torch.randn(2, 3, *model.default_cfg["input_size"][1:])
    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor compiles C++")
@pytest.mark.parametrize(("recipe", "packed"), [("vitality", False), ("vitrify", True)], ids=str)
def test_deit_base_under_inductor(recipe, packed):
    torch.manual_seed(0)
    torch.compiler.reset()
    model = timm.create_model("deit_base_patch16_224").eval()
    assert len(convert_(model, recipes.get(recipe)).changed) >= len(model.blocks) == 12
    if packed:
        assert pack_(model) > 0
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        eager = model(images)
        compiled = torch.compile(model, fullgraph=True)(images)
        exact = model.double()(images.double())
    # Fused, the same sums run in another order: they round as often as eager's do, and each way has its own luck.
    assert (compiled - exact).norm() <= 2 * (eager - exact).norm()
    assert (eager - exact).norm() <= 1e-5 * exact.norm()
