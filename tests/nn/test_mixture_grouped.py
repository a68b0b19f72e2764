"""Mixtures whose experts run on grouped tokens: same rows, everywhere that kernels could be, nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from mixture_models import by_modules, mixture_linear, timm_mlp, tokens
from timm.layers import GluMlp, Mlp
from torch import nn

from vitrify.nn import Mixture
from vitrify.ops.experts import aten
from vitrify.ops.shift import reference


class Own(Mlp):
    pass


BOTH = pytest.mark.parametrize("make", [mixture_linear, timm_mlp])


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("packed", [True, False])
def test_rows_and_shares_stay(make, packed, kernels):
    mixture, x = make().eval(), tokens(3, 7, 8)
    if packed:
        mixture.pack_()
    grouped, share = mixture(x), mixture.share.clone()
    assert kernels == ([(True, True)] if make is mixture_linear else [(True, False), (False, True)])
    torch.testing.assert_close(grouped, by_modules(mixture, x), rtol=1e-6, atol=1e-6)
    with torch.enable_grad():
        torch.testing.assert_close(grouped, mixture(x).detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(share, mixture.share)
    assert 0 < share[0] < 1
    assert (mixture.train().aux_losses(), len(kernels)) == ({}, 2 if make is mixture_linear else 4)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_an_expert_that_rounds_its_tokens(make, activations, kernels):
    mixture, x = make(activations=activations).eval(), tokens(3, 7, 8)
    torch.testing.assert_close(mixture(x), by_modules(mixture, x), rtol=1e-6, atol=1e-6)
    mixture.pack_()
    torch.testing.assert_close(mixture(x), by_modules(mixture, x), rtol=1e-6, atol=1e-6)
    assert len(kernels) == (2 if make is mixture_linear else 4)


@torch.no_grad()
@BOTH
def test_under_autocast_and_in_half_precision(make, kernels):
    mixture, x = make().eval(), tokens(30, 8)
    mixture.pack_()
    expected = mixture(x)
    tolerance = 16 * torch.finfo(torch.bfloat16).eps * expected.abs().max().item()
    kernels.clear()
    with torch.autocast("cpu", torch.bfloat16):
        out = mixture(x)
    half = copy.deepcopy(mixture).bfloat16()(x.bfloat16())
    assert len(kernels) == 2 * (1 if make is mixture_linear else 2)
    assert out.dtype == half.dtype == torch.bfloat16
    same = (mixture.router(x).argmax(-1) == mixture.router.bfloat16()(x.bfloat16()).argmax(-1))[:, None]
    assert same.sum() > 20
    for found in (out, half):
        torch.testing.assert_close(found.float() * same, expected * same, rtol=0, atol=tolerance)


@torch.no_grad()
@BOTH
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_compiled_without_a_graph_break_each_expert_on_its_tokens(make, activations, monkeypatch):
    mixture, x = make(activations=activations).eval(), tokens(2, 5, 8)
    mixture.pack_()
    expected, rows = mixture(x), []
    original = aten.shift_linear_op
    monkeypatch.setattr(aten, "shift_linear_op", lambda x, *others: rows.append(len(x)) or original(x, *others))
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert rows == [round(10 * mixture.share[1].item())] * (1 if make is mixture_linear else 2)
    assert 0 < rows[0] < 10


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_what_keeps_its_own_path(make, training, kernels):
    x = tokens(20, 8)
    mixture = make().train(training)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(torch.fx.symbolic_trace(mixture)(x), mixture(x))
        before = len(kernels)
        torch.export.export(mixture, (x,)).module()(x)
        with pytest.raises(RuntimeError):
            mixture(x.half())
        hooked = make().train(training)
        hooked.shift.register_forward_hook(lambda *_: None)
        hooked(x)
    assert len(kernels) == before == (1 if make is mixture_linear else 2)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: mixture_linear(experts=("multiply", "int8")),
        lambda: mixture_linear(experts=("multiply", "shift", "int8"), alpha=(6, 4, 5)),
        lambda: timm_mlp(norm_layer=nn.LayerNorm),
        lambda: timm_mlp(act_layer=nn.PReLU),
        lambda: timm_mlp(GluMlp),
        lambda: timm_mlp(Own),
    ],
    ids=["int8", "three", "norm", "prelu", "glu", "subclass"],
)
def test_other_experts_and_mlps_keep_their_own_path(make, kernels):
    mixture = make().eval()
    assert isinstance(mixture, Mixture)
    assert mixture(tokens(20, 8)).isfinite().all()
    assert kernels == []


@torch.no_grad()
def test_a_replaced_layer_keeps_its_own_path(kernels):
    class Adapter(nn.Linear):
        pass

    mixture = timm_mlp().eval()
    mixture.fc1 = Adapter(8, 12)
    mixture(tokens(20, 8))
    assert kernels == []


def test_dropout_keeps_its_own_path_where_it_drops(kernels):
    mixture, x = timm_mlp(drop=0.5).eval(), tokens(20, 8)
    for child in mixture.modules():
        if isinstance(child, nn.Dropout):
            child.train()
    with torch.no_grad():
        assert not torch.equal(mixture(x), mixture(x))
    mixture.train()(x)
    assert kernels == []
    timm_mlp(drop=0.0).train()(x)
    mixture.eval()(x)
    assert len(kernels) == 4


@torch.no_grad()
@BOTH
def test_on_a_cpu_a_packed_mixture_decodes_each_weight_once(make, monkeypatch):
    calls, original = [], reference.decode
    monkeypatch.setattr(reference, "decode", lambda *arguments: calls.append(1) or original(*arguments))
    mixture = make().eval()
    mixture.pack_()
    for count in (20, 1, 7):
        mixture(tokens(count, 8))
    assert len(calls) == (1 if make is mixture_linear else 2)
