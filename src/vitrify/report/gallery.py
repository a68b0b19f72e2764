"""Pictures over images: predictions, where attention looks, which tokens multiply, and the codes of the patches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from vitrify.report.figures import GREY, INK, RIGHT, SOFTMAX, TAYLOR, WRONG, new_figure, style

SHIFTED = "#59616a"
"""A shifted token on a black ground: not black itself, which would look like a hole in the page."""
ZERO = "#e3e6ea"
"""A bit that is 0."""


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
        _strip(grid.flat)
        bar = figure.colorbar(colours, ax=grid, fraction=0.03, pad=0.015, extend="both")
        bar.set_label("weight, multiples of uniform", color=INK)
        bar.outline.set_edgecolor(GREY)
    return figure


def dispatch_maps(images: Sequence[Tensor], columns: dict[str, Tensor]) -> Figure:
    """Draw one row per image: the image, and for each mixture the tokens that multiply in colour, the others in grey.

    Args:
        images: each (channels, height, width) in [0, 1].
        columns: title -> maps (images, grid height, grid width) bool, True for tokens that multiply; the share of them
            is written above each map.
    """
    with style():
        figure = new_figure(1.45 * (len(columns) + 1), 1.62 * len(images) + 0.6)
        grid = figure.subplots(len(images), len(columns) + 1, squeeze=False)
        for row, image in enumerate(images):
            _show(grid[row][0], image)
            for column, (title, maps) in enumerate(columns.items(), start=1):
                grid[row][column].imshow(_tinted(image, maps[row]).numpy(), interpolation="nearest")
                share = f"{maps[row].float().mean().item():.0%}"
                grid[row][column].set_title(f"{title}\n{share}" if row == 0 else share, fontsize=9, pad=3)
        _strip(grid.flat)
        figure.legend(
            handles=[Patch(color=TAYLOR, label="multiply (share above the map)"), Patch(color=SHIFTED, label="shift")],
            loc="outside lower center",
            ncols=2,
        )
    return figure


def _tinted(image: Tensor, multiplies: Tensor) -> Tensor:
    """Return the image in grey with the tokens that multiply in colour: (height, width, 3) in [0, 1]."""
    grey = image.mean(0).unsqueeze(-1)
    mask = F.interpolate(multiplies[None, None].float(), size=grey.shape[:2], mode="nearest")[0, 0].unsqueeze(-1)
    dark, colour = torch.tensor(to_rgb(SHIFTED)), torch.tensor(to_rgb(TAYLOR))
    # Light parts stay below white, where the two colours would look alike.
    return torch.lerp(torch.lerp(dark, colour, mask), torch.ones(3), 0.65 * grey)


def code_maps(images: Sequence[Tensor], query: dict[str, Tensor], key: dict[str, Tensor]) -> Figure:
    """Draw one row per image: the image, then single bits of the queries' codes and of the keys' over the patch grid.

    Args:
        images: each (channels, height, width) in [0, 1].
        query: title -> bits (images, grid height, grid width) bool.
        key: the same for the keys, drawn in another colour.
    """
    with style():
        figure = new_figure(1.2 * (len(query) + len(key) + 1), 1.25 * len(images) + 0.35)
        grid = figure.subplots(len(images), len(query) + len(key) + 1, squeeze=False)
        columns = [(title, bits, SOFTMAX) for title, bits in query.items()]
        columns += [(title, bits, TAYLOR) for title, bits in key.items()]
        for row, image in enumerate(images):
            _show(grid[row][0], image)
            for column, (title, bits, colour) in enumerate(columns, start=1):
                axes = grid[row][column]
                axes.imshow(bits[row].numpy(), ListedColormap([ZERO, colour]), vmin=0, vmax=1, interpolation="nearest")
                if row == 0:
                    axes.set_title(title, fontsize=9)
        _strip(grid.flat)
    return figure


def _strip(grid: Iterable[Axes]) -> None:
    for axes in grid:
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_visible(False)


def _show(axes: Axes, image: Tensor) -> None:
    if image.shape[0] == 1:
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
