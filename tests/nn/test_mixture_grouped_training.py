"""Training a mixture on grouped tokens: the gradients of its experts as modules, whatever training does to them."""

from __future__ import annotations

import copy

import pytest
import torch
from mixture_models import by_modules, mixture_linear, timm_mlp, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

BOTH = pytest.mark.parametrize("make", [mixture_linear, timm_mlp])


def gradients(module, out, x=None):
    """Return the gradients of a loss of `out` and the balancing losses, by name."""
    (out.float().square().sum() + sum(module.aux_losses().values())).backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    if x is not None:
        found["x"] = x.grad.clone()
        x.grad = None
    return found


@BOTH
@pytest.mark.parametrize("activations", ["float", "int8", "float8"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_the_modules(make, packed, activations, kernels):
    mixture, x = make(activations=activations).double(), tokens(3, 7, 8).double().requires_grad_()
    if packed:
        mixture.pack_()
    out = mixture(x)
    losses = mixture.aux_losses()
    assert len(kernels) == (1 if make is mixture_linear else 2)
    assert all(loss.requires_grad for loss in losses.values())
    expected = by_modules(mixture, x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found = gradients(mixture, out, x)
    assert found.keys() == {"x", *(name for name, _ in mixture.named_parameters())}
    mixture(x)  # its losses anew
    torch.testing.assert_close(found, gradients(mixture, expected, x), rtol=1e-10, atol=1e-10)


@BOTH
@pytest.mark.parametrize("expert", [0, 1])
def test_an_expert_without_tokens_gets_zero_gradients(make, expert, kernels):
    mixture, x = make(), tokens(20, 8)
    with torch.no_grad():
        mixture.router.bias[expert] = -100
    found = gradients(mixture, mixture(x))
    assert kernels
    assert found.keys() == {name for name, _ in mixture.named_parameters()}
    assert mixture.share[expert] == 0
    experts = {name: grad for name, grad in found.items() if not name.startswith("router")}
    for name, grad in experts.items():
        assert (grad.abs().max() == 0) == (name.startswith("shift") == (expert == 1)), name


@BOTH
def test_no_tokens(make, kernels):
    mixture, x = make(), tokens(0, 8)
    out = mixture(x)
    out.sum().backward()
    assert out.shape == (0, 6 if make is mixture_linear else 8)
    assert all(p.grad.abs().max() == 0 for p in mixture.parameters())
    assert kernels


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(make, reentrant, kernels):
    mixture, x = make(), tokens(20, 8).requires_grad_()
    block = nn.Sequential(mixture, nn.GELU())
    block(x).square().sum().backward()
    expected = [p.grad.clone() for p in (x, *mixture.parameters())]
    mixture.zero_grad()
    x.grad = None
    checkpoint(block, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close([p.grad for p in (x, *mixture.parameters())], expected)
    assert len(kernels) == 3 * (1 if make is mixture_linear else 2)


@BOTH
def test_balancing_losses_survive_checkpointing(make, kernels):
    mixture, x = make(), tokens(20, 8)
    block = nn.Sequential(mixture, nn.GELU())
    expected = gradients(mixture, block(x))
    torch.testing.assert_close(gradients(mixture, checkpoint(block, x, use_reentrant=False)), expected)
    assert kernels


@BOTH
def test_under_autocast(make, kernels):
    mixture, x = make(), tokens(40, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = mixture(x), by_modules(mixture, x)
        losses = mixture.aux_losses()
    assert kernels
    assert out.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    found = gradients(mixture, out)
    mixture(x)
    wanted = gradients(mixture, expected)
    for name, grad in found.items():
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted[name], rtol=0.05, atol=0.05 * wanted[name].abs().max().item())


@BOTH
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_compiled_step_runs_each_expert_on_its_tokens(make, activations):
    mixture, x = make(activations=activations), tokens(20, 8).requires_grad_()
    out = mixture(x)
    share = mixture.share.clone()
    expected = gradients(mixture, out, x)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    mixture.share.zero_()
    compiled = torch.compile(mixture, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(compiled, out)
    torch.testing.assert_close(mixture.share, share)
    torch.testing.assert_close(gradients(mixture, compiled, x), expected)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert sum("mixture_linear" in name for name in called) == (1 if make is mixture_linear else 2)
    assert sum("linear" in name for name in called) == sum("mixture_linear" in name for name in called) + 1  # router


def test_ddp_gets_every_gradient(tmp_path, kernels):
    mixture = timm_mlp()
    nn.init.constant_(mixture.router.bias[:1], 100.0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mixture)
        for _ in range(2):  # a parameter without a gradient in the first step is an error in the second
            (wrapped(tokens(5, 8)).sum() + sum(mixture.aux_losses().values())).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert kernels
    assert mixture.shift.fc1.weight.grad.abs().max() == 0
    assert mixture.router.weight.grad is not None


@BOTH
def test_training_reaches_what_the_modules_reach(make, kernels):
    mixture, x = make(), tokens(64, 8)
    twin, target = copy.deepcopy(mixture), tokens(64, 6 if make is mixture_linear else 8, seed=3)
    for model, run in ((mixture, mixture), (twin, lambda x: by_modules(twin, x))):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            (run(x) - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(dict(mixture.named_parameters()), dict(twin.named_parameters()), rtol=1e-4, atol=1e-5)
    assert kernels
