"""The rows of experiments/nvs: each recipe makes of the small GNT what the row says."""

from pathlib import Path

import pytest
import yaml

from vitrify import convert_, recipes
from vitrify.nn import Hamming, Mixture, ShiftLinear, Taylor
from vitrify.nn.integer import IntLinear
from vitrify.nvs import create

FOLDER = Path(__file__).parents[2] / "experiments" / "nvs"
ROWS = yaml.safe_load((FOLDER / "rows.yaml").read_text())["rows"]
EXPECTED = {
    "softmax": set(),
    "taylor": {Taylor},
    "add": {Hamming},
    "add_quadratic": {Hamming},
    "add_taylor": {Hamming},
    "shift": {ShiftLinear},
    "add_shift": {Hamming, ShiftLinear},
    "shiftaddvit": {Hamming, ShiftLinear, Mixture},
    "vitrify": {Taylor, ShiftLinear, Mixture},
    "vitrify_distill": {Taylor, ShiftLinear, Mixture},
    "vitrify_squares_distill": {Taylor, ShiftLinear, Mixture},
    "int8": {IntLinear},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_what_they_are_called(name):
    recipe = ROWS[name]["recipe"]
    model = create("gnt_small")
    conversion = convert_(model, recipes.get(FOLDER / recipe if recipe.endswith(".yaml") else recipe))
    kinds = (Taylor, Hamming, ShiftLinear, Mixture, IntLinear)
    assert {kind for module in model.modules() for kind in kinds if isinstance(module, kind)} == EXPECTED[name]
    cores = [module for module in model.modules() if isinstance(module, (Taylor, Hamming))]
    assert len(cores) == (4 if EXPECTED[name] & {Taylor, Hamming} else 0)
    assert not conversion.refused
