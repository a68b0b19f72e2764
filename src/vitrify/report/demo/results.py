"""What the demo found out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vitrify.bench import Machine, Speedup, Timing
from vitrify.report.capture import LogitHistogram
from vitrify.report.gallery import Example
from vitrify.report.measure import Accuracy, Point
from vitrify.report.primitives import ExponentCounts

SMALL = (
    "This is a small demonstration: a ViT of a quarter of a million parameters on 28 x 28 pixel photographs of "
    "clothes, fine-tuned for a short time on a CPU. It shows the method, not what a large model reaches."
)


@dataclass(frozen=True)
class MixtureLayer:
    """One mixture of the fine-tuned model: shares of patches that multiply, and milliseconds of each expert alone.

    share       of all patches; `target` is where the latency-aware loss wants it
    on_object   of the patches that show something; `on_ground` of the others, which are black. NaN if there are none
    multiply_ms, shift_ms   of the expert on all tokens of one image, as deployed
    """

    share: float
    target: float
    on_object: float
    on_ground: float
    multiply_ms: float
    shift_ms: float


@dataclass(frozen=True)
class ShiftAdd:
    """What became of a second copy: Taylor attention, shifting projections, MLPs that mix; and codes from a third.

    accuracies   "zero-shot", "fine-tuned", and of the calibrated, untrained model on codes "codes"
    latencies    batch 1: "softmax", "taylor" (fine-tuned) and "mixture", packed as deployed; `speedup` is the last's
                 over the first
    dispatch     by title, bool maps (images, grid height, grid width) of `Results.map_images`
    exponents    by the shift layer's name
    code_fits    by the core's name, the share of the logits' squares that its codes explain
    query_bits, key_bits   maps as in dispatch, of the last core's first head
    """

    recipe: str
    accuracies: dict[str, Accuracy]
    training_seconds: float
    latencies: dict[str, Timing]
    speedup: Speedup
    num_images: int
    layers: dict[str, MixtureLayer]
    dispatch: dict[str, Tensor]
    exponents: dict[str, ExponentCounts]
    code_fits: dict[str, float]
    query_bits: dict[str, Tensor]
    key_bits: dict[str, Tensor]

    def numbers(self) -> dict[str, Any]:
        """Return every number as JSON-ready values."""
        return {
            "recipe": self.recipe,
            "accuracy_percent": {name: asdict(accuracy) for name, accuracy in self.accuracies.items()},
            "training_seconds": self.training_seconds,
            "latency": {name: asdict(timing) for name, timing in self.latencies.items()},
            "speedup": self.speedup.to_dict(),
            "num_images": self.num_images,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "exponents": {
                name: {"lowest": layer.lowest, "counts": layer.counts.tolist(), "zeros": layer.zeros}
                for name, layer in self.exponents.items()
            },
            "code_fits": self.code_fits,
        }


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
    shift_add: ShiftAdd

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
            "shift_add": self.shift_add.numbers(),
        }
