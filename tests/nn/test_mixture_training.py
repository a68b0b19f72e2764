"""A mixture's router learns, and its losses survive what training does to them."""

import pytest
import torch
import torch.nn.functional as F
from mixture_models import BOTH, Mlp, linear, mixture_linear, mixture_mlp, seeded, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitrify.errors import InputError


@BOTH
def test_the_router_gets_a_gradient_and_changes_its_mind(make):
    mixture, x = make(), tokens(64, 8)
    target = (linear() if make is mixture_linear else seeded(Mlp()))(x).detach()
    before = mixture.router(x).argmax(-1)
    F.mse_loss(mixture(x), target).backward()
    assert mixture.router.weight.grad.abs().max() > 1e-5
    # Multiplication is right by construction, so the gate must learn to prefer it: no other loss says so.
    optimizer = torch.optim.SGD(mixture.router.parameters(), lr=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        (mixture(x) - target).square().sum(-1).mean().backward()
        optimizer.step()
    after = mixture.router(x).argmax(-1)
    assert (after != before).any()


def test_balancing_alone_reaches_the_asked_share():
    mixture, generator = mixture_mlp(balance=1.0), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(mixture.router.parameters(), lr=3e-3)
    shares = []
    for _ in range(80):
        mixture(torch.randn(256, 8, generator=generator))
        shares.append(mixture.share.clone())
        optimizer.zero_grad()
        sum(mixture.aux_losses().values()).backward()
        optimizer.step()
    torch.testing.assert_close(torch.stack(shares[-40:]).mean(0), torch.tensor([0.4, 0.6]), rtol=0, atol=0.02)


def test_losses_belong_to_the_last_training_forward():
    mixture, x = mixture_linear(), tokens(3, 7, 8)
    assert mixture.aux_losses() == {}
    assert mixture.share.isnan().all()
    mixture(x)
    losses, twice = mixture.aux_losses(), mixture_linear(balance=0.02)
    twice(x)
    for name in ("importance", "load"):
        assert losses[name].item() > 0
        torch.testing.assert_close(twice.aux_losses()[name], 2 * losses[name])
    share = F.one_hot(mixture.router(x).argmax(-1), 2).float().mean((0, 1))
    torch.testing.assert_close(mixture.share, share)
    mixture.eval()(x[0])
    assert mixture.aux_losses() == {}
    assert mixture.train().aux_losses() == {}
    torch.testing.assert_close(mixture.share, F.one_hot(mixture.router(x[0]).argmax(-1), 2).float().mean(0))


def gradients(module, out):
    (out.square().sum() + sum(module.aux_losses().values())).backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    return found


@BOTH
def test_losses_survive_checkpointing_and_keep_nothing_of_the_recomputation(make):
    mixture, x = make(balance=1.0), tokens(20, 8)
    # With something behind the mixture, which is recomputed to its end only then.
    block = nn.Sequential(mixture, nn.GELU())
    expected = gradients(mixture, block(x))
    out = checkpoint(block, x, use_reentrant=False)
    logits = mixture._logits
    found = gradients(mixture, out)
    torch.testing.assert_close(found, expected)
    assert mixture._logits is logits


def test_reentrant_checkpointing_is_named():
    mixture, x = mixture_linear(), tokens(20, 8).requires_grad_()
    checkpoint(mixture, x, use_reentrant=True)
    with pytest.raises(InputError, match="use_reentrant=False"):
        mixture.aux_losses()
    with torch.no_grad():
        assert set(mixture.aux_losses()) == {"importance", "load"}


def test_losses_and_share_survive_compile():
    mixture, x = mixture_mlp(balance=1.0), tokens(20, 8)
    out = mixture(x)
    share = mixture.share.clone()
    expected = gradients(mixture, out)
    mixture.share.zero_()
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, out)
    torch.testing.assert_close(mixture.share, share)
    torch.testing.assert_close(gradients(mixture, compiled), expected)


def test_ddp_does_not_wait_for_an_expert_without_tokens(tmp_path):
    mixture = mixture_linear()
    nn.init.constant_(mixture.router.bias[:1], 100.0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mixture)
        for _ in range(2):  # a parameter without a gradient in the first step is an error in the second
            (wrapped(tokens(5, 8)).sum() + sum(mixture.aux_losses().values())).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert mixture.shift.weight.grad.abs().max() == 0
    assert mixture.router.weight.grad is not None


def test_an_expert_without_tokens_gets_a_zero_gradient():
    mixture = mixture_linear()
    with torch.no_grad():
        mixture.router.bias.copy_(torch.tensor([100.0, 0.0]))
    out = mixture(tokens(5, 8))
    assert torch.equal(out, F.linear(tokens(5, 8), mixture.weight, mixture.bias))
    assert mixture.share.tolist() == [1, 0]
    out.sum().backward()
    assert mixture.shift.weight.grad.abs().max() == 0
    assert mixture(tokens(0, 8)).shape == (0, 6)
