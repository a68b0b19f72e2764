"""How every figure looks, and how it is saved: an SVG for the page, a PNG for a slide."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

INK = "#24292e"
"""Text and axes. On white it is what it says; in a page, `html` replaces it by the page's own text colour."""
SOFTMAX, TAYLOR, RIGHT, WRONG, GREY = "#3a7ec2", "#e0791b", "#2c9a51", "#d8423f", "#8a929b"
"""Chosen to be told apart, and to be readable on white and on near-black."""


@contextmanager
def style() -> Iterator[None]:
    """Within this, figures have a transparent ground, few lines, and text as text."""
    with rc_context(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.titlesize": 10,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "legend.frameon": False,
            "lines.linewidth": 2,
            "figure.constrained_layout.use": True,
        }
    ):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` x `height` inches that belongs to no window and no global state."""
    return Figure(figsize=(width, height))


def svg(figure: Figure) -> str:
    """Return `figure` as an SVG document."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """Write `figure` on white at 150 dots per inch."""
    with style():
        figure.savefig(path, dpi=150, facecolor="white")
