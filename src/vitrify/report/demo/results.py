"""What the demo found out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vitrify.bench import Machine
from vitrify.report.capture import LogitHistogram
from vitrify.report.gallery import Example
from vitrify.report.measure import Accuracy, Point

SMALL = (
    "This is a small demonstration: a ViT of a quarter of a million parameters on 28 x 28 pixel photographs of "
    "clothes, fine-tuned for a short time on a CPU. It shows the method, not what a large model reaches."
)


@dataclass(frozen=True)
class Results:
    """All that the demo found out. Maps are (images, grid height, grid width), in multiples of uniform attention."""

    model: str
    recipe: str
    data: Sequence[str]
    machine: Machine
    accuracies: dict[str, Accuracy]
    training: list[dict[str, Any]]
    training_seconds: float
    multiplications: dict[str, int]
    points: list[Point]
    histograms: list[LogitHistogram]
    tuned_histograms: list[LogitHistogram]
    examples: list[Example]
    map_images: list[Tensor]
    head_maps: dict[str, Tensor]
    block_maps: dict[str, Tensor]

    def numbers(self) -> dict[str, Any]:
        """Return every number as JSON-ready values; logit shares in [-1, 1) are without and with centred keys."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "data": self.data,
            "machine": asdict(self.machine),
            "accuracy_percent": {name: asdict(accuracy) for name, accuracy in self.accuracies.items()},
            "training_seconds": self.training_seconds,
            "multiplications_per_image": self.multiplications,
            "points": [asdict(point) for point in self.points],
            "logits_in_range": {
                tuned.module: {
                    "original": [raw.raw_share, raw.centred_share],
                    "tuned": [tuned.raw_share, tuned.centred_share],
                }
                for raw, tuned in zip(self.histograms, self.tuned_histograms, strict=True)
            },
        }


def _shares(histogram: LogitHistogram) -> list[float]:
    return [histogram.raw_share, histogram.centred_share]
