"""What a conversion costs and gains, measured on the models themselves: accuracy, multiplications, memory, latency."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitrify.bench.memory import allocated_peak_mib
from vitrify.bench.model_checks import check_parts
from vitrify.bench.observe import named_cores
from vitrify.bench.reference import check_attention
from vitrify.bench.timing import Speedup, Timing, interleave, speedup
from vitrify.errors import VitrifyError
from vitrify.nn.cores import Core, Softmax, Taylor
from vitrify.report.capture import Seen, capture


@dataclass(frozen=True)
class Accuracy:
    """Share of images named right, in percent, and the half-width of its 95 % interval in points."""

    percent: float
    margin: float

    @classmethod
    def of(cls, predictions: Tensor, labels: Tensor) -> Accuracy:
        """Compare two integer vectors of equal length."""
        share = (predictions == labels).double().mean().item()
        return cls(100 * share, 196 * math.sqrt(share * (1 - share) / len(labels)))


@torch.no_grad()
def predict(model: nn.Module, dataset: Dataset[Any], *, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """Return the predicted and the true class of every image, two integer vectors, in the dataset's order."""
    predictions, labels = [], []
    for images, truth in DataLoader(dataset, batch_size):
        predictions.append(model(images).argmax(dim=-1))
        labels.append(truth)
    return torch.cat(predictions), torch.cat(labels)


@dataclass(frozen=True)
class Point:
    """Softmax against Taylor at one number of tokens, batch 1: one attention core, and the whole model.

    Memory is what one core allocates at its worst moment, its result included, in MiB: `softmax` through PyTorch's
    fused kernel, `unfused` with the weights written out, `taylor`.
    """

    tokens: int
    image_size: int
    core_softmax: Timing
    core_taylor: Timing
    core_speedup: Speedup
    model_softmax: Timing
    model_taylor: Timing
    model_speedup: Speedup
    memory_mib: dict[str, float]


@torch.no_grad()
def compare(original: nn.Module, converted: nn.Module, images: Tensor, *, seconds: float) -> Point:
    """Measure a softmax model and its Taylor conversion on the same image, after checking both.

    Args:
        original: converted by the softmax recipe, in eval mode.
        converted: with Taylor cores, in eval mode.
        images: (1, channels, height, width).
        seconds: time to spend on each of the two comparisons.

    Raises:
        VitrifyError: an attention core's output differs from its float64 value; nothing is timed then.
    """
    name, core = next(iter(named_cores(original).items()))
    seen = capture(original, images)[name]
    attend = {"softmax": _bind(core), "taylor": _bind(Taylor())}
    _require_sound(seen, attend)
    for model in (original, converted):
        check = check_parts(model, images)
        if not check.passed:
            raise VitrifyError(f"a part of {type(model).__name__} is wrong, so it is not timed: {check}")
    cores = interleave(attend, [seen], seconds=seconds, device=images.device)
    models = interleave({"softmax": original, "taylor": converted}, [images], seconds=seconds, device=images.device)
    unfused = _bind(Softmax(fused=False))
    return Point(
        tokens=seen.key.shape[-2],
        image_size=images.shape[-1],
        core_softmax=Timing.of(cores["softmax"]),
        core_taylor=Timing.of(cores["taylor"]),
        core_speedup=speedup(cores["softmax"], cores["taylor"]),
        model_softmax=Timing.of(models["softmax"]),
        model_taylor=Timing.of(models["taylor"]),
        model_speedup=speedup(models["softmax"], models["taylor"]),
        memory_mib={
            "softmax": allocated_peak_mib(lambda: attend["softmax"](seen)),
            "unfused": allocated_peak_mib(lambda: unfused(seen)),
            "taylor": allocated_peak_mib(lambda: attend["taylor"](seen)),
        },
    )


def _bind(core: Core) -> Callable[[Seen], Tensor]:
    def run(seen: Seen) -> Tensor:
        output: Tensor = core(seen.query, seen.key, seen.value, scale=seen.scale)
        return output

    return run


def _require_sound(seen: Seen, attend: dict[str, Callable[[Seen], Tensor]]) -> None:
    for kind in ("softmax", "taylor"):
        check = check_attention(
            attend[kind](seen),
            seen.query,
            seen.key,
            seen.value,
            scale=seen.scale,
            kind=kind,
        )
        if not check.passed:
            raise VitrifyError(f"the {kind} core is wrong, so it is not timed: {check}")
