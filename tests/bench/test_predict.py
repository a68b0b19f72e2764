"""benchmarks/predict.py: floors by hand, and what a target cannot multiply is left out."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from vitrify.bench.roofline import Cost
from vitrify.cost import target_file

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))
predict = importlib.import_module("predict")
sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def h100():
    return predict.roofline(target_file.load("h100"))


def test_floors_are_bytes_over_bandwidth_or_products_over_rate(h100):
    found = predict.floors(h100, {"bytes": Cost(2, 3_350_000), "products": Cost(989_400_000, 2)})
    assert found == pytest.approx({"bytes": 1.0, "products": 1.0})  # us


def test_a_format_that_the_target_lacks_is_left_out():
    a100 = predict.roofline(target_file.load("a100"))
    costs = {"bf16": Cost(100, 100), "FP8": Cost(100, 100, {"float8_e4m3fn": 100})}
    assert list(predict.floors(a100, costs)) == ["bf16"]


def test_attention_at_4096_tokens(h100):
    # SDPA: 4 n^2 d products of 12 heads, at the peak. Taylor: q, k, v and the result in bfloat16, by the bandwidth.
    sdpa, taylor = 4 * 4096**2 * 64 * 12 / 989.4e6, 4 * 4096 * 64 * 12 * 2 / 3.35e6
    row = next(line for line in predict.attention_table(h100, backward=False) if line.startswith("| 12 | 4,096 |"))
    assert row == f"| 12 | 4,096 | {sdpa:,.3g} | {taylor:,.3g} ({sdpa / taylor:.2f}x) |"
