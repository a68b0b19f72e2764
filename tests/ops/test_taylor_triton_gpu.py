"""The tests of `taylor_triton_cases.py` on a GPU, and what only a GPU shows. Run them with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.register_assert_rewrite("taylor_triton_cases")

from taylor_inputs import moved, packed, padding, qkv  # noqa: E402
from taylor_triton_cases import *  # noqa: E402, F403

from vitrify.ops import selected_backend, taylor_attention  # noqa: E402
from vitrify.ops.taylor import reference, triton  # noqa: E402
from vitrify.ops.taylor.triton_kernels import forward_kernel, reduce_kernel, stream_kernel  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the interpreter runs these cases"),
]


def inputs(*shape, dtype=torch.bfloat16, seed=0):
    return [moved(t, "cuda", dtype) for t in packed(*qkv(*shape, seed=seed))]


def variants(kernel):
    """Return how many binaries of a kernel are loaded on this GPU."""
    cache = kernel.device_caches[torch.cuda.current_device()]
    return len(cache[0] if isinstance(cache, tuple) else cache)


def test_the_op_takes_the_triton_kernels():
    assert selected_backend("cuda") == "triton"
    before = variants(forward_kernel)
    leaves = [t.requires_grad_() for t in inputs(1, 2, 50, 50, 48, 48)]
    taylor_attention(*leaves).sum().backward()
    assert variants(forward_kernel) > before


def test_sequence_lengths_share_their_binaries():
    counts = []
    for lengths in ((197, 577, 4096), (1, 2, 15, 16, 63, 64, 200, 1000, 1024, 5000)):
        for tokens in lengths:
            taylor_attention(*inputs(1, 3, tokens, tokens, 64, 64))
        counts.append([variants(kernel) for kernel in (forward_kernel, reduce_kernel, stream_kernel)])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("tokens", [197, 4096])
def test_compiled_and_in_a_cuda_graph(tokens):
    query, key, value = inputs(1, 3, tokens, tokens, 64, 64)
    mask = padding(1, tokens).cuda()
    eager = taylor_attention(query, key, value, mask)
    assert torch.equal(torch.compile(taylor_attention, fullgraph=True)(query, key, value, mask), eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = taylor_attention(query, key, value, mask)
    fresh = inputs(1, 3, tokens, tokens, 64, 64, seed=1)
    for static, new in zip((query, key, value), fresh, strict=True):
        static.copy_(new)
    graph.replay()
    assert torch.equal(out, taylor_attention(*fresh, mask))


def test_opcheck():
    leaves = [t.requires_grad_() for t in inputs(2, 3, 70, 70, 16, 16, dtype=torch.float32)]
    keep = padding(2, 70)[:, 0, 0].cuda()
    torch.library.opcheck(torch.ops.vitrify.taylor_attention.default, (*leaves, keep, 0.5))


@pytest.mark.parametrize("tokens", [4096, 65_536])
def test_long_sequences_with_a_common_offset(tokens):
    """The plan's own chunks, up to 64 of them: bfloat16 inputs with an offset of 100 times their spread."""
    query, key, value = (t.bfloat16() for t in qkv(1, 2, 64, tokens, 64, 64, offset=100.0))
    _, state = triton.forward(*(t.cuda() for t in (query, key, value)), None, 0.125)
    _, truth = reference.affine(*(t.double() for t in (query, key, value)), None, 0.125)
    for actual, expected in zip(state, truth, strict=True):
        assert (actual.cpu().double() - expected).norm() <= 1e-5 * expected.norm()
