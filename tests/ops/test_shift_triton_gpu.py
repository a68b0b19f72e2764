"""The tests of `shift_triton_cases.py` on a GPU, and what only a GPU shows. Run them with `pytest -m gpu`."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton", reason="Triton is not installed")
pytest.register_assert_rewrite("shift_triton_cases")

from shift_triton_cases import *  # noqa: E402, F403
from shift_triton_cases import layer, numbers  # noqa: E402

from vitrify.ops import shift_linear  # noqa: E402
from vitrify.ops.shift import reference, triton  # noqa: E402
from vitrify.ops.shift.triton_kernels import decode_kernel, multiply_kernel, quantize_kernel  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the interpreter runs these cases"),
]
ACTIVATIONS = ("float", "int8", "float8")


def inputs(tokens, width, channels, *, bits=4, dtype=torch.bfloat16, seed=0):
    """Return input, codes, exponent and bias on the GPU."""
    tensors = (numbers(tokens, width, seed=seed, dtype=dtype), *layer(width, channels, bits))
    return [t.cuda() for t in (*tensors, numbers(channels, seed=2, dtype=dtype))]


def variants(kernel):
    """Return how many binaries of a kernel are loaded on this GPU."""
    cache = kernel.device_caches[torch.cuda.current_device()]
    return len(cache[0] if isinstance(cache, tuple) else cache)


def test_the_op_takes_the_kernels():
    before = variants(multiply_kernel)
    shift_linear(*inputs(3, 96, 80))
    assert variants(multiply_kernel) > before


def test_token_counts_share_their_binaries():
    counts = []
    for rows in ((1, 32, 64, 197, 513), (2, 15, 16, 17, 33, 63, 65, 100, 128, 500, 512, 577, 1576)):
        for tokens in rows:
            for activations in ACTIVATIONS:
                shift_linear(*inputs(tokens, 192, 768), activations=activations)
        counts.append([variants(kernel) for kernel in (multiply_kernel, decode_kernel, quantize_kernel)])
    assert counts[0] == counts[1]


def close(compiled, eager, input, codes, exponent, activations):
    """Allow two values of a token to be rounded to their neighbours, as Inductor may; and results to be rounded."""
    steps = {"int8": 127, "float8": 448 / 32}[activations]
    weight = triton.decoded(codes, exponent, input.shape[-1], 4, "ps", torch.float32)
    step = input.float().abs().amax(-1, keepdim=True) / steps * weight.abs().amax(1)
    assert ((compiled.float() - eager.float()).abs() <= 2 * step + 2**-7 * eager.float().abs()).all()


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, 64, 197, 1576])
def test_compiled_and_in_a_cuda_graph(tokens, activations):
    input, codes, exponent, bias = inputs(tokens, 768, 3072)

    def call(x):
        return shift_linear(x, codes, exponent, bias, activations=activations)

    eager, compiled = call(input), torch.compile(call, fullgraph=True)(input)
    if activations == "float":
        assert torch.equal(compiled, eager)
    else:
        close(compiled, eager, input, codes, exponent, activations)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(input)
    fresh = inputs(tokens, 768, 3072, seed=1)[0]
    input.copy_(fresh)
    graph.replay()
    assert torch.equal(out, call(fresh))


@torch.no_grad()
@pytest.mark.parametrize("activations", ["int8", "float8"])
@pytest.mark.parametrize("width", [768, 200])
@pytest.mark.parametrize("front", [torch.nn.LayerNorm, torch.nn.GELU])
def test_the_rounding_is_fused_into_what_precedes_it(front, width, activations):
    """One kernel of Inductor's, and none of ours that rounds; also where the widths must be padded afterwards."""
    if activations == "float8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton has no E4M3 below compute capability 8.9")
    input, codes, exponent, bias = inputs(1576, width, 768)
    module = (front(width) if front is torch.nn.LayerNorm else front()).to(input)

    def call(x):
        return shift_linear(module(x), codes, exponent, bias, activations=activations)

    out, (code,) = run_and_get_code(torch.compile(call, fullgraph=True), input)
    assert code.count("@triton.jit") == 1
    assert "vitrify.shift_linear_rounded.default" in code
    assert "vitrify.shift_linear.default" not in code
    # In bfloat16 values are neighbours of eager's: the norm's own result is not rounded in between.
    expected = call(input).float()
    assert (out.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_opcheck(activations):
    input, codes, exponent, bias = inputs(6, 70, 20, dtype=torch.float32)
    arguments = (input.requires_grad_(), codes, exponent, bias.requires_grad_(), 4, "ps", activations)
    torch.library.opcheck(torch.ops.vitrify.shift_linear.default, arguments)


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1576, 384, 1536), (12_608, 768, 3072), (577, 1024, 4096)], ids=str)
def test_many_tokens(shape, activations, bits):
    """Products by torch, against the plain formula; of 6 bits and float8, all from registers."""
    input, codes, exponent, bias = inputs(*shape, bits=bits)
    actual = shift_linear(input, codes, exponent, bias, bits=bits, activations=activations).double()
    # On the CPU: by a number, a GPU's PyTorch multiplies by the reciprocal, and scales and roundings to them differ.
    where = "cuda" if activations == "float" else "cpu"
    plain = reference.linear(*(t.to(where) for t in (input, codes, exponent, bias)), bits, "ps", activations)
    expected = plain.to(actual)
    # Each is rounded to bfloat16; sums of E4M3 products may lose 2^-13 of the largest, as a Hopper adds them.
    sums = {"float": 2**-18, "int8": 0.0, "float8": 2**-11}[activations] * expected.abs().max()
    assert ((actual - expected).abs() <= 2**-7 * expected.abs() + sums).all()


def microseconds(call, flush):
    """Return the median time of `call` in a CUDA graph, with the L2 cache emptied before each run."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(50):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("size", [(1024, 4096), (4096, 1024)], ids=str)
def test_few_tokens_are_no_slower_than_bfloat16(record_property, tokens, size):
    """A ViT-L's layers beside cuBLAS in bfloat16, and torch's INT4 weight-only product for the record."""
    input, codes, exponent, _ = inputs(tokens, *size)
    weight = triton.decoded(codes, exponent, size[0], 4, "ps", torch.bfloat16)
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    ours = microseconds(lambda: shift_linear(input, codes, exponent), flush)
    cublas = microseconds(lambda: F.linear(input, weight), flush)
    record_property("us", {"shift": ours, "bf16": cublas, "int4": int4_microseconds(input, size, flush)})
    assert ours <= cublas


def int4_microseconds(input, size, flush):
    """Return the time of torch's own INT4 product in groups of 128, None where torch lacks it."""
    group = 128
    try:
        nibbles = torch.randint(256, (size[1], size[0] // 2), dtype=torch.uint8, device="cuda")
        weight = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
        scales = torch.ones(size[0] // group, size[1], 2, dtype=torch.bfloat16, device="cuda")
        return microseconds(lambda: torch.ops.aten._weight_int4pack_mm(input, weight, group, scales), flush)
    except (RuntimeError, AttributeError):
        return None
