"""The demo's second copy, in which projections shift and MLPs mix, and a third with codes: what they do, measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify import recipes
from vitrify.bench import Speedup, Timing
from vitrify.bench.timing import interleave, speedup
from vitrify.convert import AttentionSpec, Recipe, convert_, pack_
from vitrify.nn import Mixture, calibrate_codes_, measure_latencies_
from vitrify.report.demo.pictures import pixels
from vitrify.report.demo.results import MixtureLayer
from vitrify.report.measure import Accuracy, predict
from vitrify.report.primitives import CodeMaps, balanced_channels, code_maps, dispatch_maps, target_share

RECIPE = recipes.vitrify()
CODES = Recipe("codes", AttentionSpec("hamming", form="taylor"))
"""ShiftAddViT's binary codes in the form that starts near the original, so that it can be shown without training."""
SHOWN_BITS = 3
BLACK = 1 / 512
"""Half a grey level: the ground of Fashion-MNIST's photographs is black."""


def description() -> str:
    """Return the recipe of the second copy in one line."""
    return f"{RECIPE.name}: attention {RECIPE.attention}; projections {RECIPE.projections}; MLPs {RECIPE.mlp}"


def mixture_layers(model: nn.Module, batches: Sequence[Tensor], example: Tensor) -> dict[str, MixtureLayer]:
    """Return, by name, which patches of `batches` each mixture of `model` multiplies, and what its experts cost.

    batches: each (images, channels, height, width). example: (1, channels, height, width), what the experts are
    timed on.
    """
    seen = [dispatch_maps(model, images) for images in batches]
    # On a copy: measuring sets the latencies that the loss would use.
    record = measure_latencies_(copy.deepcopy(model), example)
    layers = {}
    for name in seen[0]:
        multiplies = torch.cat([maps[name] for maps in seen])
        on_object = torch.cat([_shows_something(images, model, multiplies.shape[1:]) for images in batches])
        mixture = model.get_submodule(name)
        assert isinstance(mixture, Mixture)
        seconds = record.modules[name].seconds
        layers[name] = MixtureLayer(
            share=_share(multiplies),
            target=target_share(mixture),
            on_object=_share(multiplies[on_object]),
            on_ground=_share(multiplies[~on_object]),
            multiply_ms=1e3 * seconds["multiply"],
            shift_ms=1e3 * seconds["shift"],
        )
    return layers


def _share(multiplies: Tensor) -> float:
    return multiplies.float().mean().item()


def _shows_something(images: Tensor, model: nn.Module, grid: torch.Size) -> Tensor:
    """Return (images, grid height, grid width) bool: whether any pixel of the patch is not black."""
    brightest = F.adaptive_max_pool2d(pixels(images, model), (grid[0], grid[1])).amax(1)
    return brightest > BLACK


@torch.no_grad()
def latencies(
    original: nn.Module, taylor: nn.Module, mixed: nn.Module, example: Tensor, *, seconds: float
) -> tuple[dict[str, Timing], Speedup]:
    """Time the three models on one image, in turns, the last one packed; and compare it with the first."""
    deployed = copy.deepcopy(mixed)
    pack_(deployed)
    models = {"softmax": original, "taylor": taylor, "mixture": deployed}
    samples = interleave(models, [example], seconds=seconds, device=example.device)
    return {name: Timing.of(values) for name, values in samples.items()}, speedup(
        samples["softmax"], samples["mixture"]
    )


def codes(
    model: nn.Module, test: Any, images: Tensor, calibration: Tensor
) -> tuple[Accuracy, dict[str, float], CodeMaps]:
    """Convert `model`, in place, to attention on codes, calibrate it without training, and look at its last block.

    Returns its accuracy on `test`, the fit of each core, and the last core's codes of `images`.
    """
    convert_(model, CODES)
    fits = calibrate_codes_(model, calibration)
    accuracy = Accuracy.of(*predict(model, test))
    *_, last = code_maps(model, images).values()
    return accuracy, fits, last


def shown_bits(codes: Tensor, what: str) -> dict[str, Tensor]:
    """Return the most balanced bits of the first head by title; codes (images, heads, bits, height, width)."""
    head = codes[:, 0]
    return {f"{what}\nbit {bit + 1}": head[:, bit] for bit in sorted(balanced_channels(head, SHOWN_BITS))}
