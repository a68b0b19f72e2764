"""The demo's figures, and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from vitrify.bench import Timing
from vitrify.bench.table import milliseconds
from vitrify.report import figures, gallery, plots
from vitrify.report.demo.results import SMALL, Results
from vitrify.report.demo.shiftadd_page import draw_shiftadd, shiftadd_section
from vitrify.report.html import Fact, Picture, Report, Section, Table
from vitrify.report.measure import Point
from vitrify.report.plots import Comparison, Curve


def draw(results: Results) -> dict[str, Figure]:
    """Return every figure by its file name."""
    steps = [line for line in results.training if line["kind"] == "train"]
    epochs = [line for line in results.training if line["kind"] == "epoch"]
    softmax = next(iter(results.accuracies.values()))
    return {
        "accuracy": plots.accuracy_bars(
            {name: accuracy.percent for name, accuracy in results.accuracies.items()},
            {name: accuracy.margin for name, accuracy in results.accuracies.items()},
        ),
        "training": plots.training_curve(
            [line["step"] for line in steps],
            [line["loss"] for line in steps],
            {line["step"]: 100 * line["eval"]["top1"] for line in epochs},
            softmax.percent,
        ),
        "predictions": gallery.predictions(results.examples),
        "latency": plots.latency_curves(
            {
                "one attention core": _comparison(results.points, "core"),
                "the whole model": _comparison(results.points, "model"),
            }
        ),
        "attention-heads": gallery.attention_maps(results.map_images, results.head_maps),
        "attention-blocks": gallery.attention_maps(results.map_images, results.block_maps),
        "logits": plots.logit_distributions(results.histograms),
        **draw_shiftadd(results),
    }


def report(results: Results, drawn: dict[str, Figure]) -> Report:
    """Return the page."""
    before, _, after = results.accuracies.values()
    first, last = results.points[0], results.points[-1]
    softmax_m, taylor_m = (results.multiplications[name] / 1e6 for name in ("softmax", "taylor"))
    memory = last.memory_mib
    return Report(
        title="From softmax to linear attention: a demonstration",
        lead=f"{SMALL} Everything below was measured by the run that wrote this page.",
        facts=[
            Fact(f"{after.percent:.1f} %", "accuracy, linear attention", f"softmax: {before.percent:.1f} %"),
            Fact(
                f"{softmax_m / taylor_m:.1f}x fewer",
                "multiplications in attention",
                f"{softmax_m:.1f} M → {taylor_m:.1f} M per image",
            ),
            Fact(
                f"{last.core_speedup.ratio:.1f}x as fast",
                f"attention core at {last.tokens:,} tokens",
                f"{first.core_speedup.ratio:.1f}x at {first.tokens}: {first.core_speedup.verdict}",
            ),
            Fact(
                f"{last.model_speedup.ratio:.1f}x as fast",
                f"whole model at {last.tokens:,} tokens",
                f"{first.model_speedup.ratio:.2f}x at {first.tokens}: {first.model_speedup.verdict}",
            ),
        ],
        sections=[
            _accuracy(results, drawn),
            Section(
                "Cost",
                f"Batch 1, on this machine, at growing resolution: {_sizes(results.points)}. Taylor attention is "
                "linear in the tokens, softmax quadratic; projections and MLPs stay what they were. Softmax runs in "
                "PyTorch's fused kernel (SDPA). Both were checked against float64 before they were timed, in turns.",
                [
                    Picture.of(
                        drawn["latency"],
                        "Latency of softmax and Taylor attention over the number of tokens, for one core and the model",
                        "Median latency, both axes logarithmic; the band is the 10th to 90th percentile, the number is "
                        "how many times as fast Taylor attention is.",
                    ),
                    _latency_table(results.points),
                    Table(
                        ["attention, per image", "softmax", "Taylor"],
                        [
                            ["multiplications", f"{softmax_m:.2f} M", f"{taylor_m:.2f} M"],
                            [
                                f"peak memory of a core, {last.tokens:,} tokens",
                                f"{memory['softmax']:.2f} MiB fused, {memory['unfused']:.1f} MiB unfused",
                                f"{memory['taylor']:.2f} MiB",
                            ],
                        ],
                        f"Multiplications in all cores at {first.tokens} tokens, counted from the shapes of queries, "
                        "keys and values in the running model (ViTALiTy's counts: no exponentials, no divisions). "
                        "Memory: what torch allocates during the call. The fused kernel never stores the weights; the "
                        "unfused does.",
                    ),
                ],
            ),
            _attention(drawn),
            _logits(results, drawn),
            shiftadd_section(results, drawn),
        ],
        colophon=[
            ("Model", results.model),
            ("Recipe", results.recipe),
            ("Second copy", results.shift_add.recipe),
            *(("Data", source) for source in results.data),
            (
                "Fine-tuning",
                f"{results.training_seconds:.0f} s, and the second copy {results.shift_add.training_seconds:.0f} s",
            ),
            ("Machine", str(results.machine)),
            ("Versions", ", ".join(f"{name} {version}" for name, version in results.machine.versions.items())),
        ],
    )


def _accuracy(results: Results, drawn: dict[str, Figure]) -> Section:
    before, zero_shot, after = results.accuracies.values()
    return Section(
        "Accuracy",
        f"Replacing softmax by its first-order Taylor expansion changes every attention: without any training "
        f"{zero_shot.percent:.1f} % of the test images are named right. Fine-tuning for "
        f"{results.training_seconds:.0f} s brings that to {after.percent:.1f} %; softmax has {before.percent:.1f} %.",
        [
            Picture.of(
                drawn["accuracy"],
                "Accuracy of the original, the converted and the fine-tuned model",
                "Accuracy on the test images; the lines are 95 % intervals, from the number of images.",
            ),
            Picture.of(
                drawn["training"],
                "Training loss and accuracy over the optimiser steps",
                "Fine-tuning: the loss on the training images, and the accuracy on the test images after each epoch.",
            ),
            Picture.of(
                drawn["predictions"],
                "Test images with the predictions of the three models",
                "The true class above each image, and what each model said below it. Top row: the first images on "
                "which the models disagree; bottom row: drawn at random.",
            ),
        ],
    )


def _attention(drawn: dict[str, Figure]) -> Section:
    return Section(
        "Where attention looks",
        "Softmax weights of the original model beside the Taylor weights (1 + q·(k - mean k) / √d) / n of the "
        "fine-tuned one. The linear form never computes these weights; they are written out here to be seen. Each row "
        "of them sums to 1, as in softmax, but single weights may be negative: a token can be subtracted.",
        [
            Picture.of(
                drawn["attention-heads"],
                "Attention maps of the centre patch in the last block, averaged and per head",
                "What the patch in the centre attends to in the last block: mean over the heads, then head by head. 1 "
                "is uniform attention; orange attends, purple subtracts.",
            ),
            Picture.of(
                drawn["attention-blocks"],
                "Attention that each patch receives in every block, averaged over heads and queries",
                "What each patch receives, block by block: mean over the heads and over all tokens as queries.",
            ),
        ],
    )


def _logits(results: Results, drawn: dict[str, Figure]) -> Section:
    rows = [
        [raw.module, *(f"{share:.1%}" for h in (raw, tuned) for share in (h.raw_share, h.centred_share))]
        for raw, tuned in zip(results.histograms, results.tuned_histograms, strict=True)
    ]
    return Section(
        "The logits, before and after centring",
        "exp(x) is close to 1 + x where |x| < 1. Subtracting the mean key from every key leaves softmax unchanged, "
        "and is meant to move the logits into that range (the ViTALiTy paper's Fig. 3). Here is what it does in this "
        "model.",
        [
            Picture.of(
                drawn["logits"],
                "Distribution of the attention logits per block, with and without centred keys",
                "Logits of the original softmax model, per block; the share in [-1, 1), shaded, before and after "
                "centring.",
            ),
            Table(
                ["share in [-1, 1)", "original", "original, centred", "fine-tuned", "fine-tuned, centred"],
                rows,
                "The same shares for the fine-tuned model, whose attention uses the centred ones.",
            ),
        ],
    )


def _latency_table(points: Sequence[Point]) -> Table:
    return Table(
        ["tokens", "core, softmax ms", "Taylor ms", "ratio", "model, softmax ms", "Taylor ms", "ratio", "verdict"],
        [
            [
                f"{point.tokens:,}",
                milliseconds(point.core_softmax.median_ms),
                milliseconds(point.core_taylor.median_ms),
                f"{point.core_speedup.ratio:.2f}x",
                milliseconds(point.model_softmax.median_ms),
                milliseconds(point.model_taylor.median_ms),
                f"{point.model_speedup.ratio:.2f}x",
                point.model_speedup.verdict,
            ]
            for point in points
        ],
        "Medians. The verdict is on the whole model, by the 95 % interval of the median of the paired ratios.",
    )


def _comparison(points: Sequence[Point], part: str) -> Comparison:
    speedups = [getattr(point, f"{part}_speedup").ratio for point in points]
    softmax, taylor = (_curve([getattr(point, f"{part}_{kind}") for point in points]) for kind in ("softmax", "taylor"))
    return Comparison([point.tokens for point in points], softmax, taylor, speedups)


def _curve(timings: Sequence[Timing]) -> Curve:
    return Curve([t.median_ms for t in timings], [t.p10_ms for t in timings], [t.p90_ms for t in timings])


def _sizes(points: Sequence[Point]) -> str:
    return f"images of {points[0].image_size} to {points[-1].image_size} pixels a side"


def write_pngs(drawn: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each figure to `<folder>/<name>.png` and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        paths.append(folder / f"{name}.png")
        figures.save_png(figure, paths[-1])
    return paths
