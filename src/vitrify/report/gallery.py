"""Pictures of what the model sees and where it looks: predictions on images, and attention over the patch grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from vitrify.report.figures import GREY, INK, RIGHT, WRONG, new_figure, style


@dataclass(frozen=True)
class Example:
    """An image, (channels, height, width) in [0, 1], its true class, and what each model in turn called it."""

    image: Tensor
    truth: str
    predictions: dict[str, str]


def predictions(examples: Sequence[Example], *, columns: int = 6) -> Figure:
    """Draw the images with every model's answer below, green where it is right and red where it is wrong."""
    lines = max(len(example.predictions) for example in examples)
    rows = -(-len(examples) // columns)
    with style():
        # Text below axes is invisible to the automatic layout, so the room for it is set aside by hand, in inches.
        picture, title, line_height = 1.6, 0.3, 0.18
        below = line_height * lines + 0.1
        figure = new_figure(1.75 * columns, (picture + title + below) * rows)
        figure.set_layout_engine("none")
        total = figure.get_figheight()
        grid = figure.subplots(
            rows,
            columns,
            squeeze=False,
            gridspec_kw={
                "left": 0.01,
                "right": 0.99,
                "top": 1 - title / total,
                "bottom": below / total,
                "hspace": (title + below) / picture,
                "wspace": 0.06,
            },
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, example in zip(grid.flat, examples, strict=False):
            _show(axes, example.image)
            axes.set_title(example.truth, fontsize=9, fontweight="bold", pad=3)
            for line, (model, answer) in enumerate(example.predictions.items()):
                right = answer == example.truth
                text = f"{model}: {answer}"
                y = -(line + 0.85) * line_height / picture
                axes.text(
                    0.5, y, text, transform=axes.transAxes, ha="center", color=RIGHT if right else WRONG, fontsize=8.5
                )
    return figure


def attention_maps(images: Sequence[Tensor], columns: dict[str, Tensor]) -> Figure:
    """Draw one row per image: the image, and its attention maps in common colours: orange attends, purple subtracts.

    Args:
        images: each (channels, height, width) in [0, 1].
        columns: title -> maps (images, grid height, grid width), in multiples of uniform attention. The strongest
            colour is their 95th percentile.
    """
    limit = max(2.0, torch.quantile(torch.cat([maps.flatten() for maps in columns.values()]).abs(), 0.95).item())
    with style():
        figure = new_figure(1.45 * (len(columns) + 1) + 0.6, 1.4 * len(images) + 0.35)
        grid = figure.subplots(len(images), len(columns) + 1, squeeze=False)
        colours = ScalarMappable(Normalize(-limit, limit), "PuOr_r")
        for row, image in enumerate(images):
            _show(grid[row][0], image)
            for column, (title, maps) in enumerate(columns.items(), start=1):
                axes = grid[row][column]
                axes.imshow(maps[row].numpy(), cmap=colours.cmap, norm=colours.norm, interpolation="nearest")
                if row == 0:
                    axes.set_title(title, fontsize=9)
        for axes in grid.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
        bar = figure.colorbar(colours, ax=grid, fraction=0.03, pad=0.015, extend="both")
        bar.set_label("weight, multiples of uniform", color=INK)
        bar.outline.set_edgecolor(GREY)
    return figure


def _show(axes: Axes, image: Tensor) -> None:
    if image.shape[0] == 1:
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
