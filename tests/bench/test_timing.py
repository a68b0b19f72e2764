import random

import pytest
import torch

from vitrify.bench.timing import MAX_ROUNDS, MIN_ROUNDS, Timing, interleave, median_interval, quantile, speedup


@pytest.mark.parametrize(
    # From tables of the binomial distribution: the widest-tailed ranks that keep 95 %.
    ("count", "rank"),
    [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (20, 6), (50, 18), (100, 40)],
)
def test_median_interval_takes_the_ranks_of_the_binomial_distribution(count, rank):
    samples = list(range(1, count + 1))
    random.Random(0).shuffle(samples)
    assert median_interval(samples) == (rank, count + 1 - rank)


def test_median_interval_covers_the_true_median_as_often_as_it_says():
    generator = random.Random(1)
    covered = 0
    for _ in range(2000):
        low, high = median_interval([generator.expovariate(1.0) for _ in range(15)])
        covered += low <= 0.6931 <= high
    assert covered / 2000 >= 0.94


def test_quantile_interpolates():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert quantile([7.0], 0.9) == 7.0


def test_timing_summarises():
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 5.0])
    assert (timing.median_ms, timing.min_ms, timing.rounds) == (3.0, 1.0, 5)
    assert timing.min_ms < timing.p10_ms < timing.median_ms < timing.p90_ms < 5.0


@pytest.mark.parametrize(
    ("contender", "verdict"),
    [
        ([5.0] * 9, "faster"),
        ([11.0] * 9, "slower"),
        ([9.0, 11.0] * 4 + [10.0], "within noise"),
        ([1.0] * 5 + [30.0] * 4, "within noise"),  # a median of 10x that so few rounds do not support
    ],
)
def test_verdict_needs_the_whole_interval_of_the_median(contender, verdict):
    result = speedup([10.0] * 9, contender)
    assert result.verdict == verdict
    assert result.low <= result.ratio <= result.high
    assert result.to_dict()["verdict"] == verdict


def test_speedup_pairs_the_rounds():
    # Both slow down together, as on a machine that gets busy: every ratio is 2.
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    result = speedup(drifting, [value / 2 for value in drifting])
    assert (result.low, result.ratio, result.high) == (2.0, 2.0, 2.0)


def test_interleave_rotates_order_and_inputs():
    calls = []
    contenders = {name: lambda argument, name=name: calls.append((name, argument)) for name in "abc"}
    samples = interleave(contenders, [0, 1], seconds=0, device=torch.device("cpu"))
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", MIN_ROUNDS)
    timed = calls[6:]  # two warm-up calls each
    assert [name for name, _ in timed[:9]] == list("abcbcacab")
    assert [argument for _, argument in timed[:9]] == [0, 0, 0, 1, 1, 1, 0, 0, 0]


def test_interleave_stops_at_the_most_rounds():
    samples = interleave({"nothing": lambda _: None}, [0], seconds=60, device=torch.device("cpu"))
    assert len(samples["nothing"]) == MAX_ROUNDS
