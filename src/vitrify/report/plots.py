"""The measurements as figures: accuracy, latency over tokens, training, the logits of Fig. 3, and exponents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba
from matplotlib.figure import Figure

from vitrify.report.capture import LogitHistogram
from vitrify.report.figures import GREY, INK, RIGHT, SOFTMAX, TAYLOR, new_figure, style
from vitrify.report.primitives import ExponentCounts

LOGITS, CENTRED = "logits q·k / √d", "with centred keys, q·(k - mean k) / √d"


@dataclass(frozen=True)
class Curve:
    """Latencies in milliseconds at growing numbers of tokens: the median, and the 10th and 90th percentile."""

    median_ms: Sequence[float]
    p10_ms: Sequence[float]
    p90_ms: Sequence[float]


@dataclass(frozen=True)
class Comparison:
    """Softmax and Taylor at the same numbers of tokens, and how many times as fast Taylor is at each."""

    tokens: Sequence[int]
    softmax: Curve
    taylor: Curve
    speedups: Sequence[float]


def accuracy_bars(accuracies: Mapping[str, float], errors: Mapping[str, float]) -> Figure:
    """Draw one bar per name: accuracy in percent, with an error bar of the given half-width in points."""
    names = list(accuracies)
    with style():
        figure = new_figure(7.5, 0.55 * len(names) + 0.7)
        axes = figure.add_subplot()
        colours = [SOFTMAX if "softmax" in name.lower() else TAYLOR for name in names]
        values = [accuracies[name] for name in names]
        spread = [errors[name] for name in names]
        axes.barh(names, values, xerr=spread, color=colours, height=0.62, error_kw={"ecolor": INK, "elinewidth": 1.2})
        for index, (value, margin) in enumerate(zip(values, spread, strict=True)):
            axes.text(min(value + margin, 100) + 1, index, f"{value:.1f} %", va="center")
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("accuracy, %")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def latency_curves(panels: Mapping[str, Comparison]) -> Figure:
    """Draw one log-log panel per title, a line for softmax and one for Taylor, spread shaded, speed-up written."""
    with style():
        figure = new_figure(4.6 * len(panels), 3.8)
        for index, (title, comparison) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for name, curve, colour in (
                ("softmax", comparison.softmax, SOFTMAX),
                ("Taylor", comparison.taylor, TAYLOR),
            ):
                axes.plot(comparison.tokens, curve.median_ms, marker="o", markersize=4.5, color=colour, label=name)
                axes.fill_between(comparison.tokens, curve.p10_ms, curve.p90_ms, color=colour, alpha=0.22, linewidth=0)
            _write_speedups(axes, comparison)
            axes.set_title(title, loc="left")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(comparison.tokens, [f"{n:,}" for n in comparison.tokens])
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
            axes.margins(x=0.1, y=0.16)
            axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
            axes.set_xlabel("tokens")
            axes.set_ylabel("latency, ms (lower is better)")
            axes.legend(loc="upper left")
    return figure


def _write_speedups(axes: Axes, comparison: Comparison) -> None:
    lower = map(min, comparison.softmax.median_ms, comparison.taylor.median_ms)
    for tokens, height, ratio in zip(comparison.tokens, lower, comparison.speedups, strict=True):
        axes.annotate(
            f"{ratio:.1f}x", (tokens, height), xytext=(0, -15), textcoords="offset points", ha="center", fontsize=9
        )


def training_curve(
    steps: Sequence[int], losses: Sequence[float], evaluations: Mapping[int, float], softmax_accuracy: float
) -> Figure:
    """Draw the training loss over steps, and beside it the accuracy in percent at the evaluated steps."""
    with style():
        figure = new_figure(9.2, 3.2)
        left, right = figure.subplots(1, 2)
        left.plot(steps, losses, color=TAYLOR)
        left.set_ylabel("training loss")
        right.axhline(softmax_accuracy, color=SOFTMAX, linestyle="--", linewidth=1.5, label="softmax, original")
        right.plot(
            list(evaluations), list(evaluations.values()), color=TAYLOR, marker="o", markersize=4.5, label="Taylor"
        )
        right.set_ylabel("accuracy, %")
        right.legend(loc="lower right")
        for axes in (left, right):
            axes.set_xlabel("optimiser step")
            axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)
    return figure


def logit_distributions(histograms: Sequence[LogitHistogram]) -> Figure:
    """Draw, per attention core, the density of the logits before and after centring, with [-1, 1) shaded."""
    columns = min(len(histograms), 4)
    rows = -(-len(histograms) // columns)
    with style():
        figure = new_figure(2.55 * columns, 2.35 * rows + 0.35)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for axes in grid.flat[len(histograms) :]:
            axes.set_visible(False)
        for axes, histogram in zip(grid.flat, histograms, strict=False):
            centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
            axes.axvspan(-1, 1, color=RIGHT, alpha=0.13, linewidth=0)
            axes.fill_between(centres, histogram.raw, step="mid", color=GREY, alpha=0.55, linewidth=0, label=LOGITS)
            axes.step(
                centres,
                histogram.centred,
                where="mid",
                color=TAYLOR,
                linewidth=1.6,
                label=CENTRED,
            )
            axes.set_title(
                f"{histogram.module}\n{histogram.raw_share:.0%} → {histogram.centred_share:.0%} in [-1, 1)",
                loc="left",
            )
            axes.set_yticks([])
            axes.set_ylim(bottom=0)
            axes.spines["left"].set_visible(False)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def exponents(layers: Mapping[str, ExponentCounts]) -> Figure:
    """Draw a heat map, one row per shift layer: the share of its weights at each exponent P, and apart those at 0.

    layers: at least one with a weight that is not 0, by the name to write in front of the row.
    """
    used = [layer for layer in layers.values() if len(layer.counts)]
    low = min(layer.lowest for layer in used)
    high = max(layer.lowest + len(layer.counts) for layer in used)
    shares = torch.zeros(len(layers), high - low, dtype=torch.float64)
    for row, layer in zip(shares, layers.values(), strict=True):
        row[layer.lowest - low :][: len(layer.counts)] = layer.shares
    zeros = torch.tensor([[layer.zero_share] for layer in layers.values()])
    # From nothing to colour, so that empty cells are the page's own ground, light or dark.
    colours = LinearSegmentedColormap.from_list("share", [to_rgba(SOFTMAX, 0), to_rgba(SOFTMAX, 1)])
    # The root shows the rare exponents too: a channel's range is wide, and few of its weights are at the far end.
    norm = PowerNorm(0.5, 0, max(shares.max().item(), zeros.max().item()))
    with style():
        figure = new_figure(8.6, 0.24 * len(layers) + 1.1)
        apart, main = figure.subplots(1, 2, width_ratios=[1.8, high - low], sharey=True)
        apart.imshow(zeros.numpy(), colours, norm=norm, interpolation="nearest", aspect="auto")
        for row, share in enumerate(zeros.flatten().tolist()):
            apart.text(0, row, f"{share:.2%}", ha="center", va="center", fontsize=8)
        apart.set_xticks([0], ["0"])
        apart.set_yticks(range(len(layers)), list(layers), fontsize=8.5)
        drawn = main.imshow(shares.numpy(), colours, norm=norm, interpolation="nearest", aspect="auto")
        ticks = range(low % 2, high - low, 2)
        main.set_xticks(list(ticks), [str(low + tick) for tick in ticks])
        main.set_xlabel("exponent P of a weight ± 2^P")
        for axes in (apart, main):
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set(visible=True, color=GREY, linewidth=0.6)
        bar = figure.colorbar(drawn, ax=(apart, main), fraction=0.03, pad=0.015, format=lambda value, _: f"{value:.0%}")
        bar.set_label("share of the layer's weights", color=INK)
        bar.outline.set_edgecolor(GREY)
    return figure
