"""What a workload adds up to: FlopCounterMode's total on models as they come, the papers' counts on converted ones."""

from __future__ import annotations

import copy
import resource
import time
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitrify
from vitrify import Recipe, workload
from vitrify.convert import AttentionSpec

# A family each; those that the trace takes longest for are left to `make test-slow`.
MODELS = (
    "deit_tiny_patch16_224",
    "pvt_v2_b0",
    "levit_128s",
    "mobilevit_xxs",
    "efficientformer_l1",
    "mixer_s32_224",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "beit_base_patch16_224",
            "coat_tiny",
            "convnext_tiny",
            "eva02_tiny_patch14_224",
            "hiera_tiny_224",
            "maxvit_tiny_tf_224",
            "resnet50",
            "swin_tiny_patch4_window7_224",
            "twins_svt_small",
            "xcit_tiny_12_p16_224",
        )
    ),
)


def build(name: str, **kwargs: object) -> tuple[nn.Module, tuple[int, int, int]]:
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs).eval()
    return model, model.pretrained_cfg["input_size"]


def counted(model: nn.Module, *inputs: torch.Tensor) -> float:
    # The counter of torch 2.11 knows no fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", MODELS)
def test_macs_equal_the_flop_counter(name):
    model, size = build(name)
    graph = workload(model, size)
    assert graph.macs == counted(model, torch.empty(1, *size, device="meta"))
    assert graph.macs == graph.count("multiply")
    assert graph.unknown == {}
    assert graph.input_shape == (1, *size)


def test_macs_of_torchs_own_attention():
    """nn.MultiheadAttention calls SDPA from within, and inference would take one fused kernel for the whole layer."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.zeros(2, 7, 32)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    graph = workload(model, example_inputs=x)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert graph.macs == counted(model, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert [op.step for op in graph.operations if op.module == "layers.0.self_attn" and op.macs] == ["", "qk", "av", ""]


def test_deit_base_in_under_three_seconds_of_one_core():
    model, _ = build("deit_base_patch16_224")
    start = time.process_time()
    assert workload(model).macs == 17_563_828_224
    assert time.process_time() - start < 3


def test_vit_huge_costs_no_memory():
    """Its 2.5 GB of weights are nowhere on the meta device, and nowhere in the trace."""
    model, size = build("vit_huge_patch14_224")
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert workload(model, size).macs == 167_293_829_120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 200_000


def test_readme_example():
    model = timm.create_model("deit_tiny_patch16_224")
    vitrify.convert_(model, vitrify.recipes.shiftaddvit())
    graph = workload(model)
    readme = (Path(vitrify.__file__).parent / "cost" / "README.md").read_text()
    for products in (graph.macs, graph.count("shift"), graph.count("add")):
        assert f"{products:,}" in readme


def multiplications(graph: vitrify.Workload, subsampling: bool = True) -> int:
    """Products of attention, as PAPERS counts them: of the matrices, and of scalars; softmax's scale is left out."""
    found = 0
    for op in graph.operations:
        if op.step and (subsampling or "downsample" not in op.module):
            found += op.macs + (op.elements if op.vector == "mul" and op.step not in ("qk", "softmax") else 0)
    return found


def linearised(model: nn.Module, bias: str = "drop") -> nn.Module:
    model = copy.deepcopy(model)
    vitrify.convert_(model, Recipe("taylor", AttentionSpec("taylor", bias=bias), keep_if_costlier=False))
    return model


@pytest.mark.parametrize(
    ("name", "softmax", "algorithm1", "affine"),
    [
        ("deit_tiny_patch16_224", 178.83, 58.55, 58.25),
        ("mobilevit_xxs", 78.18, 8.59, 8.42),
        ("mobilevit_xs", 117.28, 19.15, 18.94),
    ],
)
def test_the_papers_counts(name, softmax, algorithm1, affine):
    model, size = build(name)
    assert multiplications(workload(model, size)) / 1e6 == pytest.approx(softmax, abs=0.005)
    converted = linearised(timm.create_model(name))
    assert multiplications(workload(converted, size, taylor="algorithm1")) / 1e6 == pytest.approx(algorithm1, abs=0.005)
    assert multiplications(workload(converted, size)) / 1e6 == pytest.approx(affine, abs=0.005)


@pytest.mark.parametrize(
    ("name", "softmax", "linear", "traced", "traced_linear", "with_bias"),
    [
        ("levit_128s", 17.22, 3.08, 24.37, 6.17, 23.37),
        ("levit_128", 33.78, 5.69, 40.93, 8.78, 37.02),
    ],
)
def test_levit_as_the_paper_would_count_and_as_traced(name, softmax, linear, traced, traced_linear, with_bias):
    """The paper's count leaves out the attention that subsamples, and the bias; a carried bias costs n^2 d_v more."""
    model = timm.create_model(name)
    before = workload(model)
    dropped, carried = (workload(linearised(model, bias), taylor="algorithm1") for bias in ("drop", "carry"))
    assert multiplications(before, subsampling=False) / 1e6 == pytest.approx(softmax, abs=0.005)
    assert multiplications(dropped, subsampling=False) / 1e6 == pytest.approx(linear, abs=0.005)
    assert multiplications(before) / 1e6 == pytest.approx(traced, abs=0.005)
    assert multiplications(dropped) / 1e6 == pytest.approx(traced_linear, abs=0.005)
    assert multiplications(carried) / 1e6 == pytest.approx(with_bias, abs=0.005)
