import pytest
import torch

from vitrify.bench.memory import allocated_peak_mib, resident_peak_of
from vitrify.errors import VitrifyError

SIZES = {"tokens": 4096, "heads": 4, "head_dim": 64, "batch_size": 1}
CASE = {**SIZES, "dtype": "float32", "device": "cpu", "compile": False}


def test_allocated_counts_the_worst_moment():
    source = torch.ones(2**18)  # 1 MiB

    def run():
        large = torch.cat([source] * 8)  # 8 MiB
        small = large[: 2**18].clone()  # 1 MiB beside it
        del large
        return torch.cat([small] * 3)  # 3 + 1 MiB later on

    assert allocated_peak_mib(run) == pytest.approx(9, abs=0.1)


def test_allocated_tells_written_out_weights_from_fused_attention():
    query = torch.randn(1, 2, 512, 32)
    fused = allocated_peak_mib(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    unfused = allocated_peak_mib(lambda: (query @ query.mT).softmax(-1) @ query)
    assert unfused >= 4.0  # two matrices of 2 x 512 x 512 floats, 2 MiB each
    assert fused < unfused / 4


def test_resident_is_measured_in_a_process_of_its_own():
    request = {
        "benchmark": "attention",
        "case": CASE,
        "contender": "SDPA",
        "seed": 0,
        "threads": 1,
    }
    # The result alone takes 4 MiB; the kernel's own buffers and rounding by pages come on top.
    assert 3.9 <= resident_peak_of("vitrify.bench.weigh", request) <= 24


def test_a_failing_process_says_why():
    with pytest.raises(VitrifyError, match="unknown benchmark 'attenton'"):
        resident_peak_of("vitrify.bench.weigh", {"benchmark": "attenton", "case": {}, "threads": 1})
