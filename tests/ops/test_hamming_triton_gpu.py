"""The tests of `hamming_triton_cases.py` on a GPU, and what only a GPU shows. Run them with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.register_assert_rewrite("hamming_triton_cases")

from hamming_triton_cases import *  # noqa: E402, F403
from taylor_inputs import moved, packed, padding, qkv  # noqa: E402

from vitrify.nn.hamming import Hamming  # noqa: E402
from vitrify.ops import hamming_attention  # noqa: E402
from vitrify.ops.hamming import pack_bits, threshold_bits  # noqa: E402
from vitrify.ops.hamming.triton_kernels import (  # noqa: E402
    apply_kernel,
    gram_kernel,
    join_kernel,
    pack_kernel,
    whole_kernel,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the interpreter runs these cases"),
]


def qkv_on_gpu(tokens, seed=0, dtype=torch.bfloat16):
    return [moved(t, "cuda", dtype) for t in packed(*qkv(1, 3, tokens, tokens, 64, 64, seed=seed))]


def variants(kernel):
    """Return how many binaries of a kernel are loaded on this GPU."""
    cache = kernel.device_caches[torch.cuda.current_device()]
    return len(cache[0] if isinstance(cache, tuple) else cache)


def test_sequence_lengths_share_their_binaries():
    """Two of each: a head's bits begin at a multiple of 16 bytes where the number of tokens is even."""
    counts = []
    for lengths in ((197, 200, 577, 4096), (1, 2, 15, 16, 63, 64, 200, 1000, 1024, 5000)):
        for tokens in lengths:
            query, key, value = qkv_on_gpu(tokens)
            codes = [threshold_bits(t, t.new_zeros(())) for t in (query, key)]
            hamming_attention(*codes, value, code_dim=64)
        kernels = (whole_kernel, gram_kernel, join_kernel, apply_kernel, pack_kernel)
        counts.append([variants(kernel) for kernel in kernels])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("tokens", [197, 4096])
@pytest.mark.parametrize("form", ["published", "taylor"])
def test_a_core_compiled_and_in_a_cuda_graph(form, tokens):
    core = Hamming(3, 64, form=form, device="cuda", dtype=torch.bfloat16)
    inputs, mask = qkv_on_gpu(tokens), padding(1, tokens).cuda()
    with torch.no_grad():
        eager = core(*inputs, mask, scale=0.125)
        compiled = torch.compile(core, fullgraph=True)(*inputs, mask, scale=0.125)
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02)  # Inductor fuses what is bfloat16 between
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = core(*inputs, mask, scale=0.125)
        fresh = qkv_on_gpu(tokens, seed=1)
        for static, new in zip(inputs, fresh, strict=True):
            static.copy_(new)
        graph.replay()
        assert torch.equal(out, core(*fresh, mask, scale=0.125))


@pytest.mark.parametrize("stored", ["bits", "numbers"])
def test_opcheck(stored):
    query, key, value = qkv_on_gpu(70, dtype=torch.float32)
    coded = [pack_bits(t) if stored == "bits" else (t > 0).float().requires_grad_() for t in (query, key)]
    arguments = (*coded, value.requires_grad_(), padding(1, 70)[:, 0, 0].cuda(), 64, False, torch.float32)
    torch.library.opcheck(torch.ops.vitrify.hamming_attention.default, arguments)
    torch.library.opcheck(torch.ops.vitrify.threshold_bits.default, (query, query.new_zeros(())))
