import io
import json

import pytest
import torch
from rich.console import Console

from vitrify.bench import Speedup, Timing, describe
from vitrify.report import render
from vitrify.report.capture import LogitHistogram
from vitrify.report.demo import Results, summary
from vitrify.report.demo.page import draw, report, write_pngs
from vitrify.report.gallery import Example
from vitrify.report.measure import Accuracy, Point


def point(tokens, softmax, taylor):
    slow, fast = (Timing(ms, ms, ms, ms, 9) for ms in (softmax, taylor))
    ratio = softmax / taylor
    speed = Speedup(ratio, ratio, ratio, ratio, ratio)
    memory = {"softmax": 2.0, "unfused": 257.0, "taylor": 3.0}
    return Point(tokens, 28, slow, fast, speed, slow, fast, speed, memory)


@pytest.fixture(scope="module")
def results():
    edges, density = torch.linspace(-1, 1, 5), torch.full((4,), 0.5)
    histograms = [LogitHistogram(f"blocks.{i}.attn.core", edges, density, density, 0.25, 0.5) for i in range(2)]
    image = torch.rand(1, 28, 28)
    answers = {"softmax": "Coat", "zero-shot": "Shirt", "tuned": "Coat"}
    return Results(
        model="a model",
        recipe="a recipe",
        data=["test images", "training images"],
        machine=describe(),
        accuracies={"softmax": Accuracy(92.5, 1.6), "zero": Accuracy(55.25, 3.1), "tuned": Accuracy(90.75, 1.8)},
        training=[
            {"kind": "train", "step": 10, "loss": 1.5},
            {"kind": "epoch", "step": 20, "loss": 1.2, "eval": {"top1": 0.9}},
        ],
        training_seconds=121.4,
        multiplications={"softmax": 19_668_992, "taylor": 3_211_264},
        points=[point(196, 0.2, 0.25), point(4096, 12345.6, 234.5)],
        histograms=histograms,
        tuned_histograms=histograms,
        examples=[Example(image, "Coat", answers)] * 12,
        map_images=[image],
        head_maps={"softmax": torch.rand(1, 14, 14), "Taylor": torch.rand(1, 14, 14)},
        block_maps={"softmax": torch.rand(1, 14, 14), "Taylor": torch.rand(1, 14, 14)},
    )


def test_the_terminal_summary_fits_80_columns(results):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary(results))
    shown = console.export_text()
    assert "…" not in shown
    for text in ("92.5 %", "55.2 %", "90.8 %", "6.1x fewer", "12,346", "52.65x", "0.80x", "slower", "training images"):
        assert text in shown
    assert "small demonstration" in shown


def test_the_page_shows_every_figure_and_number(results, tmp_path):
    drawn = draw(results)
    page = render(report(results, drawn))
    assert page.count("<figure>") == len(drawn) == 7
    for text in ("90.8 %", "6.1x fewer", "52.6x as fast", "4,096", "12,346", "0.80x at 196: slower", "a recipe"):
        assert text in page
    assert "small demonstration" in page
    assert results.machine.cpu in page
    assert {path.stem for path in write_pngs(drawn, tmp_path)} == set(drawn)


def test_the_numbers_are_plain_json(results):
    numbers = json.loads(json.dumps(results.numbers()))
    assert numbers["accuracy_percent"]["tuned"] == {"percent": 90.75, "margin": 1.8}
    assert numbers["points"][1]["core_taylor"]["median_ms"] == 234.5
    assert numbers["logits_in_range"]["blocks.0.attn"]["tuned"] == [0.25, 0.5]
