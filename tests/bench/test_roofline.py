"""The floor of a call that multiplies in more than one dtype."""

import pytest
import torch

from vitrify.bench.roofline import Cost, Roofline, probe


def test_each_dtype_takes_its_own_rate():
    limits = Roofline(10.0, 4.0, "float32", {"int8": 16.0})
    both = Cost(flops=8_000_000, bytes_moved=0, narrow={"int8": 4_000_000})
    assert limits.floor_ms(both) == pytest.approx(4 / 4 + 4 / 16)
    assert limits.floor_ms(Cost(flops=8_000_000, bytes_moved=50_000_000, narrow={"int8": 4_000_000})) == 5.0
    better = limits.best(Roofline(9.0, 5.0, "float32", {"int8": 20.0}))
    assert better == Roofline(10.0, 5.0, "float32", {"int8": 20.0})


@pytest.mark.slow
def test_the_probe_measures_the_narrow_rates_it_is_asked_for():
    limits = probe(torch.device("cpu"), torch.float32, {"int8", "bfloat16"})
    assert limits.narrow_gflop_s.keys() == {"int8", "bfloat16"}
    assert min(limits.narrow_gflop_s.values()) > 0.1
