"""The page's section on shift layers, mixtures and codes, and its figures."""

from __future__ import annotations

from matplotlib.figure import Figure

from vitrify.bench.table import milliseconds
from vitrify.report import gallery, plots
from vitrify.report.demo.results import Results, ShiftAdd
from vitrify.report.html import Picture, Section, Table
from vitrify.report.measure import Accuracy


def draw_shiftadd(results: Results) -> dict[str, Figure]:
    """Return the section's figures by their file names."""
    mixed = results.shift_add
    return {
        "dispatch": gallery.dispatch_maps(results.map_images, mixed.dispatch),
        "exponents": plots.exponents(mixed.exponents),
        "codes": gallery.code_maps(results.map_images, mixed.query_bits, mixed.key_bits),
    }


def shiftadd_section(results: Results, drawn: dict[str, Figure]) -> Section:
    """Return the section."""
    mixed = results.shift_add
    before, after = mixed.accuracies["zero-shot"].percent, mixed.accuracies["fine-tuned"].percent
    fits = mixed.code_fits.values()
    return Section(
        "Shift, add and mix",
        "A second copy of the model goes further (recipe vitrify): besides Taylor attention, with a convolution on V, "
        "the weights of its projections are powers of two, by which hardware could shift instead of multiplying, and "
        "in each MLP a router sends every token either to the original weights or to powers of two (ShiftAddViT). "
        f"Converted it names {before:.1f} % of the test images right, after {mixed.training_seconds:.0f} s of "
        f"fine-tuning {after:.1f} %. Taylor attention alone had {results.training_seconds:.0f} s, so this does not "
        "rank the two. Nor is it a gain in speed: there is no kernel here that shifts. A packed layer decodes its "
        "powers of two and multiplies by them, and sorting the tokens comes on top. What follows shows what the "
        "algorithm does, not what hardware made for it would gain.",
        [
            _models(results),
            Picture.of(
                drawn["dispatch"],
                "Test images with the tokens that each MLP multiplies in colour",
                "Which patches each MLP multiplies (orange) and which it shifts (grey), in the fine-tuned model: the "
                "router's own choice, with its share per image. It is not a map of importance: how many tokens "
                "multiply is what the latency-aware loss asks for, and only which ones is learned.",
            ),
            _shares(mixed),
            Picture.of(
                drawn["exponents"],
                "Share of the weights at each exponent, for every shift layer",
                "The exponents P of the fine-tuned model's shift layers, and apart the share of weights that are 0. "
                "The colour follows the root of the share, so that rare exponents can be seen. 5 bits give each output "
                "channel 15 exponents, from its own largest down. The picture says nothing about the rounding error: "
                "neighbouring powers of two are a factor of 2 apart, however many there are.",
            ),
            Picture.of(
                drawn["codes"],
                "Bits of the query and key codes over the patch grid, for four test images",
                "Binary codes as ShiftAddViT's attention, which only adds, would use them: single bits of queries "
                "(blue is 1) and keys (orange is 1) in the last block's first head, the most balanced ones. "
                f"They come from a third copy, calibrated on training images and not trained; the "
                f"codes explain {min(fits):.0%} to {max(fits):.0%} of the squares of its blocks' logits. Neither of "
                "the models above uses them.",
            ),
        ],
    )


def _models(results: Results) -> Table:
    mixed, (before, _, after) = results.shift_add, results.accuracies.values()
    speed = mixed.speedup
    return Table(
        ["model", "accuracy", "latency, ms"],
        [
            ["softmax, original", _percent(before), milliseconds(mixed.latencies["softmax"].median_ms)],
            [
                f"Taylor, fine-tuned {results.training_seconds:.0f} s",
                _percent(after),
                milliseconds(mixed.latencies["taylor"].median_ms),
            ],
            ["recipe vitrify, zero-shot", _percent(mixed.accuracies["zero-shot"]), ""],
            [
                f"recipe vitrify, fine-tuned {mixed.training_seconds:.0f} s",
                _percent(mixed.accuracies["fine-tuned"]),
                milliseconds(mixed.latencies["mixture"].median_ms),
            ],
            ["attention on codes, calibrated, not trained", _percent(mixed.accuracies["codes"]), ""],
        ],
        f"Accuracy on the test images with its 95 % interval; median latency of the whole model, batch 1, shift layers "
        f"packed, timed in turns. Recipe vitrify against softmax: {speed.ratio:.2f}x, {speed.verdict}.",
    )


def _shares(mixed: ShiftAdd) -> Table:
    return Table(
        ["MLP", "multiplied", "wanted", "of the clothes", "of the ground", "multiplying, ms", "shifting, ms"],
        [
            [
                name,
                f"{layer.share:.1%}",
                f"{layer.target:.0%}",
                f"{layer.on_object:.1%}",
                f"{layer.on_ground:.1%}",
                milliseconds(layer.multiply_ms),
                milliseconds(layer.shift_ms),
            ]
            for name, layer in mixed.layers.items()
        ],
        f"Share of patches that multiply, counted from the dispatch of {mixed.num_images} test images; the ground is "
        "every patch that is wholly black. Wanted: by the latency-aware loss, from the paper's latencies of 6 to 4; a "
        "short training need not get there. On the right what was measured here: each expert alone on one image's "
        "tokens, the shifting one packed. measure_latencies_ puts measured latencies in the paper's place.",
    )


def _percent(accuracy: Accuracy) -> str:
    return f"{accuracy.percent:.1f} ± {accuracy.margin:.1f} %"
