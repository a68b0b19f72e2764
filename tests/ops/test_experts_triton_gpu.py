"""The tests of `experts_triton_cases.py` on a GPU, and what only a GPU shows. Run them with `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.register_assert_rewrite("experts_triton_cases")

from experts_inputs import pattern, routed  # noqa: E402
from experts_triton_cases import *  # noqa: E402, F403
from experts_triton_cases import linears  # noqa: E402

from vitrify.nn import MixtureLinear  # noqa: E402
from vitrify.ops.experts.triton_kernels import linear_kernel  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the interpreter runs these cases"),
]


ACTIVATIONS = pytest.mark.parametrize("activations", ["float", "int8", "float8"])


def deployed(activations="float", width=192, columns=768, dtype=torch.bfloat16):
    """Return a packed MixtureLinear on the GPU, in eval mode."""
    torch.manual_seed(0)
    mixture = MixtureLinear.adopt_(torch.nn.Linear(width, columns), activations=activations).to("cuda", dtype).eval()
    mixture.pack_()
    return mixture


def variants(kernel):
    """Return how many binaries of a kernel are loaded on this GPU."""
    cache = kernel.device_caches[torch.cuda.current_device()]
    return len(cache[0] if isinstance(cache, tuple) else cache)


@torch.no_grad()
@ACTIVATIONS
def test_a_deployed_module_takes_the_kernels_and_does_not_wait(activations):
    mixture = deployed(activations)
    # No token is so close to the other expert that rounding its logits in bfloat16 would send it there.
    x, router = routed(pattern("random", 788), 192, torch.bfloat16)
    for parameter, value in zip((mixture.router.weight, mixture.router.bias), router, strict=True):
        parameter.copy_(value)
    x = x.reshape(4, 197, 192).cuda()
    before = variants(linear_kernel)
    mixture(x)
    assert variants(linear_kernel) > before
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = mixture(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wide = mixture.float()
    # A step of E4M3 is an eighth: tokens that differ by a rounding to bfloat16 may round apart.
    tolerance = 0.1 if activations == "float8" else 0.02
    torch.testing.assert_close(out.float(), wide(x.float()), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [64, 197, 1576])
def test_a_cuda_graph_holds_a_mixture_whatever_the_router_decides(tokens):
    mixture = deployed()
    (weight, bias), columns = (mixture.router.weight, mixture.router.bias), 192
    static = torch.zeros(tokens, columns, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        mixture(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mixture(static)
    for name in ("first", "second", "alternating", "random"):
        x, router = routed(pattern(name, tokens), columns, torch.bfloat16)
        static.copy_(x)
        weight.copy_(router[0])
        bias.copy_(router[1])
        graph.replay()
        share = mixture.share.clone()
        assert torch.equal(out, mixture(static))
        assert torch.equal(share, mixture.share)
        assert share[1].item() == pytest.approx(pattern(name, tokens).double().mean().item())


@torch.no_grad()
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_whole(mode):
    mixture, x = deployed(), torch.randn(197, 192, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(mixture, fullgraph=True, mode=mode)
    for _ in range(3):
        out = compiled(x).clone()
    assert torch.equal(out, mixture(x))


def test_opcheck():
    x, router = routed(pattern("random", 70), 32, torch.bfloat16)
    x, *router = (t.cuda() for t in (x, *router))
    layers = [t.cuda() if isinstance(t, torch.Tensor) else t for t in linears(32, 24, 4, "ps", torch.bfloat16)]
    order, counts = torch.ops.vitrify.mixture_order(x, *router)
    torch.library.opcheck(torch.ops.vitrify.mixture_order.default, (x, *router))
    torch.library.opcheck(torch.ops.vitrify.mixture_linear.default, (x, order, counts, *layers, "float", True, True))


@torch.no_grad()
def test_token_counts_share_their_binaries():
    mixture = deployed()
    counts = []
    # Close to each other: tiles depend on the number of tokens for each of the GPU's processors.
    for sizes in ((400, 1576, 12_608), (401, 1577, 12_600)):
        for tokens in sizes:
            mixture(torch.randn(tokens, 192, device="cuda", dtype=torch.bfloat16))
        counts.append(variants(linear_kernel))
    assert counts[0] == counts[1]
