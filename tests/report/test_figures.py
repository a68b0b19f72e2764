import re

import matplotlib.image
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from vitrify.report import figures, gallery, plots
from vitrify.report.capture import LogitHistogram
from vitrify.report.primitives import ExponentCounts


def texts(figure):
    return re.sub(r"<[^>]+>", "\n", figures.svg(figure))


def test_bars_are_as_long_as_the_accuracy():
    figure = plots.accuracy_bars({"softmax": 91.25, "Taylor": 40.0}, {"softmax": 1.5, "Taylor": 3.0})
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [91.25, 40.0]
    assert [to_hex(bar.get_facecolor()) for bar in axes.patches] == [figures.SOFTMAX, figures.TAYLOR]
    assert "91.2 %" in texts(figure)


def test_latency_says_how_many_times_faster():
    slow = plots.Curve([3.0, 300.0], [2.0, 280.0], [4.0, 390.0])
    fast = plots.Curve([4.0, 20.0], [3.0, 19.0], [5.0, 30.0])
    panels = {
        "core": plots.Comparison([196, 4096], slow, fast, [0.75, 15.04]),
        "model": plots.Comparison([196, 4096], slow, slow, [1.0, 1.0]),
    }
    figure = plots.latency_curves(panels)
    for axes, title in zip(figure.axes, panels, strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_title(loc="left") == title
    shown = texts(figure)
    for text in ("0.8x", "15.0x", "1.0x", "4,096", "latency, ms"):
        assert text in shown


def test_training_curve_shows_both_and_the_goal():
    figure = plots.training_curve([10, 20], [2.0, 1.0], {20: 80.0}, 91.5)
    loss, accuracy = figure.axes
    assert loss.lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert accuracy.lines[0].get_ydata() == [91.5, 91.5]
    assert accuracy.lines[1].get_xdata() == [20]


@pytest.mark.parametrize("count", [1, 4, 6])
def test_logits_have_one_panel_per_core(count):
    edges = torch.linspace(-6, 6, 13)
    density = torch.full((12,), 1 / 12)
    histograms = [LogitHistogram(f"blocks.{i}", edges, density, density, 0.25, 0.75) for i in range(count)]
    figure = plots.logit_distributions(histograms)
    assert sum(axes.get_visible() for axes in figure.axes) == count
    assert texts(figure).count("25% → 75% in [-1, 1)") == count


def test_answers_are_green_where_right_and_red_where_wrong():
    example = gallery.Example(torch.rand(1, 28, 28), "Coat", {"softmax": "Coat", "tuned": "Shirt"})
    figure = gallery.predictions([example])
    colours = {text.get_text(): to_hex(text.get_color()) for text in figure.axes[0].texts}
    assert colours == {"softmax: Coat": figures.RIGHT, "tuned: Shirt": figures.WRONG}


@pytest.mark.parametrize("count", [1, 6, 12])
def test_no_text_is_cut_off_or_drawn_over(count):
    example = gallery.Example(torch.rand(3, 28, 28), "Ankle boot", {f"model {i}": "T-shirt/top" for i in range(3)})
    figure = gallery.predictions([example] * count)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = [text for axes in figure.axes for text in (*axes.texts, axes.title) if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in shown]
    assert len(boxes) == 4 * count
    width, height = canvas.get_width_height()
    assert all(box.y0 >= -1 and box.y1 <= height + 1 and box.x0 >= -1 and box.x1 <= width + 1 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_attention_maps_share_their_colours_and_zero_is_in_the_middle():
    maps = {"softmax": torch.rand(2, 4, 4) * 5, "Taylor": torch.rand(2, 4, 4) * 3 - 1}
    figure = gallery.attention_maps([torch.rand(1, 8, 8)] * 2, maps)
    drawn = [image for axes in figure.axes for image in axes.images if image.get_array().shape == (4, 4)]
    assert len(drawn) == 4
    limits = {image.get_clim() for image in drawn}
    assert len(limits) == 1
    low, high = limits.pop()
    assert low == -high
    assert high >= 2


def test_tokens_that_multiply_are_coloured_with_their_share_above():
    image = torch.zeros(1, 8, 12)
    image[0, :, 6:] = 1.0
    multiplies = torch.tensor([[True, False, True], [False, False, False]])
    figure = gallery.dispatch_maps([image, image], {"mlp": torch.stack([multiplies, ~multiplies])})
    first, second = figure.axes[1], figure.axes[3]
    assert first.get_title() == "mlp\n33%"
    assert second.get_title() == "67%"
    drawn = first.images[0].get_array()
    assert drawn.shape == (8, 12, 3)
    assert to_hex(drawn[0, 0]) == figures.TAYLOR  # a black patch that multiplies
    assert to_hex(drawn[7, 0]) == gallery.SHIFTED
    red, _, blue = drawn[0, 11]
    assert red - blue > 0.2  # a white one is still coloured, and a white one that shifts is not
    assert drawn[7, 11].max() - drawn[7, 11].min() < 0.1


def test_bits_of_queries_and_keys_are_told_apart():
    bits = torch.tensor([[[True, False]]])
    figure = gallery.code_maps([torch.rand(1, 4, 4)], {"query": bits}, {"key": bits})
    for axes, colour in zip(figure.axes[1:], (figures.SOFTMAX, figures.TAYLOR), strict=True):
        (image,) = axes.images
        shown = image.to_rgba(image.get_array())
        assert [to_hex(pixel) for pixel in shown[0]] == [colour, gallery.ZERO]


def test_exponents_stand_in_their_columns_and_zeros_apart():
    layers = {
        "qkv": ExponentCounts(-3, torch.tensor([1, 2]), 1),
        "fc1": ExponentCounts(-1, torch.tensor([4]), 0),
        "fc2": ExponentCounts(0, torch.zeros(0, dtype=torch.int64), 4),
    }
    figure = plots.exponents(layers)
    apart, main, _ = figure.axes
    assert main.images[0].get_array().tolist() == [[0.25, 0.5, 0], [0, 0, 1], [0, 0, 0]]
    assert [text.get_text() for text in main.get_xticklabels()] == ["-2"]
    assert main.get_xticks().tolist() == [1]  # the columns are -3 to -1
    assert apart.images[0].get_array().flatten().tolist() == [0.25, 0, 1]
    assert [text.get_text() for text in apart.texts] == ["25.00%", "0.00%", "100.00%"]
    assert apart.images[0].norm is main.images[0].norm


def test_png_has_a_white_ground(tmp_path):
    figures.save_png(plots.accuracy_bars({"softmax": 50.0}, {"softmax": 1.0}), tmp_path / "a.png")
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels[0, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
