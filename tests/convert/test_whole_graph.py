"""A converted model is one graph: torch.compile(fullgraph=True) takes it whole, and its outputs stay equal."""

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
