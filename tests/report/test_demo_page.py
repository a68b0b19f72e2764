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
from vitrify.report.demo.results import MixtureLayer, ShiftAdd
from vitrify.report.gallery import Example
from vitrify.report.measure import Accuracy, Point
from vitrify.report.primitives import ExponentCounts


def point(tokens, softmax, taylor):
    slow, fast = (Timing(ms, ms, ms, ms, 9) for ms in (softmax, taylor))
    ratio = softmax / taylor
    speed = Speedup(ratio, ratio, ratio, ratio, ratio)
    memory = {"softmax": 2.0, "unfused": 257.0, "taylor": 3.0}
    return Point(tokens, 28, slow, fast, speed, slow, fast, speed, memory)


def shift_add():
    slow, fast = Timing(33.3, 33, 33, 34, 9), Timing(9.9, 9, 9, 10, 9)
    bits = torch.rand(1, 14, 14) > 0.5
    return ShiftAdd(
        recipe="another recipe",
        accuracies={"zero-shot": Accuracy(52.9, 3.1), "fine-tuned": Accuracy(86.5, 2.1), "codes": Accuracy(59.1, 3.0)},
        training_seconds=61.2,
        latencies={"softmax": fast, "taylor": fast, "mixture": slow},
        speedup=Speedup(0.3, 0.3, 0.3, 0.3, 0.3),
        num_images=100,
        layers={f"blocks.{i}.mlp": MixtureLayer(0.413 + i / 10, 0.4, 0.535, 0.296, 0.25, 0.75) for i in range(4)},
        dispatch={"blocks.0.mlp": bits},
        exponents={"blocks.0.attn.qkv": ExponentCounts(-5, torch.tensor([3, 4]), 1)},
        code_fits={"blocks.0.attn.core": 0.61, "blocks.1.attn.core": 0.58},
        query_bits={"query\nbit 1": bits},
        key_bits={"key\nbit 2": bits},
    )


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
        shift_add=shift_add(),
    )


def test_the_terminal_summary_fits_80_columns(results):
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(summary(results))
    shown = console.export_text()
    assert "…" not in shown
    for text in ("92.5 %", "55.2 %", "90.8 %", "6.1x fewer", "12,346", "52.65x", "0.80x", "slower", "training images"):
        assert text in shown
    assert "small demonstration" in shown
    lines = [line.rstrip() for line in shown.splitlines()]
    assert "Shift, add, mix (recipe vitrify): 52.9 % converted, 86.5 % tuned for 61 s." in lines
    assert "Tokens multiplied, by MLP: 41, 51, 61, 71 % (wanted 40 %); 0.30x, slower." in lines


def test_the_page_shows_every_figure_and_number(results, tmp_path):
    drawn = draw(results)
    page = render(report(results, drawn))
    assert page.count("<figure>") == len(drawn) == 10
    for text in ("90.8 %", "6.1x fewer", "52.6x as fast", "4,096", "12,346", "0.80x at 196: slower", "a recipe"):
        assert text in page
    assert "small demonstration" in page
    assert results.machine.cpu in page
    for text in (
        "Shift, add and mix",
        "52.9 ± 3.1 %",
        "86.5 ± 2.1 %",
        "0.30x, slower",
        "41.3%",
        "29.6%",
        "another recipe",
    ):
        assert text in page
    assert "58% to 61% of the squares" in page
    assert "there is no kernel here that shifts" in page
    assert {path.stem for path in write_pngs(drawn, tmp_path)} == set(drawn)


def test_the_numbers_are_plain_json(results):
    numbers = json.loads(json.dumps(results.numbers()))
    assert numbers["accuracy_percent"]["tuned"] == {"percent": 90.75, "margin": 1.8}
    assert numbers["points"][1]["core_taylor"]["median_ms"] == 234.5
    assert numbers["logits_in_range"]["blocks.0.attn"]["tuned"] == [0.25, 0.5]
    assert numbers["shift_add"]["layers"]["blocks.0.mlp"]["target"] == 0.4
    assert numbers["shift_add"]["speedup"]["verdict"] == "slower"
    assert numbers["shift_add"]["exponents"]["blocks.0.attn.qkv"] == {"lowest": -5, "counts": [3, 4], "zeros": 1}
