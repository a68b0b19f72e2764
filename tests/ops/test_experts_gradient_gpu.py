"""The tests of `experts_gradient_cases.py` on a GPU, and what only a GPU shows of training: `pytest -m gpu`."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.register_assert_rewrite("experts_gradient_cases")

from experts_gradient_cases import *  # noqa: E402, F403
from timm.layers import Mlp  # noqa: E402

from vitrify.nn import MixtureLinear, mixture_grouped, mixture_mlp_  # noqa: E402
from vitrify.ops.experts import groups_of  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: the interpreter runs these cases"),
]
KINDS = pytest.mark.parametrize("kind", ["linear", "mlp"])
AMP = pytest.mark.parametrize("amp", [True, False], ids=["bfloat16", "float32"])


def mixture_of(kind, activations="float"):
    """Return a mixture in training mode on the GPU, in float32."""
    torch.manual_seed(0)
    if kind == "linear":
        return MixtureLinear.adopt_(torch.nn.Linear(192, 768), activations=activations).cuda()
    return mixture_mlp_(Mlp(192, 768), activations=activations).cuda()


def tokens():
    return torch.randn(4, 197, 192, generator=torch.Generator().manual_seed(1)).cuda().requires_grad_()


def step(mixture, x, amp):
    """Run both passes."""
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        out = mixture(x)
        loss = out.float().square().mean() + sum(mixture.aux_losses().values())
    loss.backward()


def gradients(mixture, x):
    """Return all gradients, and forget them."""
    found = {name: p.grad.clone() for name, p in (*mixture.named_parameters(), ("x", x))}
    mixture.zero_grad()
    x.grad = None
    return found


@contextlib.contextmanager
def never_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@KINDS
@AMP
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_step_does_not_wait_and_has_the_modules_gradients(kind, amp, activations, monkeypatch):
    mixture, x = mixture_of(kind, activations), tokens()
    step(mixture, x, amp)
    gradients(mixture, x)
    with never_waiting():
        step(mixture, x, amp)
    found = gradients(mixture, x)
    monkeypatch.setattr(mixture_grouped, "kernels_take", lambda *_: False)
    step(mixture, x, amp)
    for name, expected in gradients(mixture, x).items():
        # Each sum is rounded to 8 bits with autocast, to 24 without, and so is what it is made of.
        tolerance = (0.03 if amp else 1e-4) * expected.abs().max().item()
        torch.testing.assert_close(
            found[name], expected, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )


@KINDS
@AMP
def test_a_cuda_graph_holds_a_step_whatever_the_router_decides(kind, amp):
    mixture, x = mixture_of(kind), tokens()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(mixture, x, amp)
            mixture.zero_grad()
            x.grad = None
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(mixture, x, amp)
    for preferred in (0.0, 100.0, -100.0):
        with torch.no_grad():
            mixture.router.bias[0] = preferred
        graph.replay()
        replayed = {name: p.grad.clone() for name, p in (*mixture.named_parameters(), ("x", x))}
        kept = {name: p.grad for name, p in (*mixture.named_parameters(), ("x", x))}
        for p in (*mixture.parameters(), x):
            p.grad = None
        step(mixture, x, amp)
        expected = gradients(mixture, x)
        for name, p in (*mixture.named_parameters(), ("x", x)):
            p.grad = kept[name]
            torch.testing.assert_close(replayed[name], expected[name])


@KINDS
def test_a_compiled_step(kind):
    mixture, x = mixture_of(kind), tokens()
    step(mixture, x, amp=True)
    expected = gradients(mixture, x)
    compiled = torch.compile(mixture, fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16):
        loss = compiled(x).float().square().mean() + sum(mixture.aux_losses().values())
    loss.backward()
    for name, grad in gradients(mixture, x).items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=0.03 * expected[name].abs().max().item())


def test_opcheck():
    groups = groups_of(torch.arange(70, device="cuda") % 2)
    x, grad = torch.randn(70, 32, device="cuda"), torch.randn(70, 48, device="cuda")
    weights, biases = torch.randn(2, 48, 32, device="cuda"), torch.randn(2, 48, device="cuda")
    inputs = [t.requires_grad_() for t in (x, weights[0].clone(), biases[0].clone())]
    x, weight, bias = inputs
    layer = (weight, bias, weights[1].clone().requires_grad_(), None, biases[1].clone().requires_grad_())
    form = (4, "ps", "float", True, False)
    torch.library.opcheck(torch.ops.vitrify.mixture_linear.default, (x, *groups, *layer, *form))
    torch.library.opcheck(torch.ops.vitrify.mixture_gradient.default, (grad, x.detach(), *groups, True, False, 2))
