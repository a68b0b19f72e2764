"""A mixture's rows are exactly its experts', whatever becomes of the module."""

import copy
import pickle

import pytest
import torch
from mixture_models import BOTH, Mlp, linear, mixture_linear, mixture_mlp, seeded, tokens
from torch import nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import IntLinear, MixtureLinear, MixtureMlp, ShiftLinear, mixture_mlp_

# --- conversion


def test_each_row_is_exactly_its_experts_row():
    source, x = linear(), tokens(3, 7, 8)
    shift, error = ShiftLinear.from_linear(source, 4, "ps")
    multiplied, shifted = source(x), shift(x)
    mixture = mixture_linear()
    index = mixture.router(x).argmax(-1, keepdim=True)
    assert error > 0.05
    assert 0 < index.sum() < index.numel()
    torch.testing.assert_close(mixture(x), torch.where(index == 0, multiplied, shifted), rtol=1e-6, atol=1e-6)
    assert (multiplied - shifted).abs().amax(-1).min() > 1e-3


def test_an_mlps_rows_are_exactly_its_experts():
    x, by_hand = tokens(3, 7, 8), copy.deepcopy(seeded(Mlp()))
    multiplied = by_hand(x)
    ShiftLinear.adopt_(by_hand.fc1, 3, "q")
    ShiftLinear.adopt_(by_hand.fc2, 3, "q")
    shifted = by_hand(x)
    mixture = mixture_mlp(bits=3, variant="q")
    index = mixture.router(x).argmax(-1, keepdim=True)
    assert 0 < index.sum() < index.numel()
    torch.testing.assert_close(mixture(x), torch.where(index == 0, multiplied, shifted), rtol=1e-6, atol=1e-6)
    assert (multiplied - shifted).abs().amax(-1).min() > 1e-3


@BOTH
def test_what_the_source_had_stays(make):
    module = linear() if make is mixture_linear else seeded(Mlp())
    source, parameters, calls = type(module), dict(module.named_parameters()), []
    module.eval().register_forward_hook(lambda *_: calls.append(1))
    next(module.parameters()).requires_grad_(False)
    mixture = MixtureLinear.adopt_(module) if make is mixture_linear else mixture_mlp_(module)
    assert mixture is module
    assert isinstance(mixture, source)
    assert mixture.source is source
    for name, parameter in parameters.items():
        assert mixture.get_parameter(name) is parameter
    added = {name.split(".")[0] for name in mixture.state_dict()} - {name.split(".")[0] for name in parameters}
    assert added == set(mixture.added_children) == {"router", "shift"}
    assert not any(child.training for child in mixture.modules())
    assert [p.requires_grad for p in mixture.shift.parameters()] == [p.requires_grad for p in parameters.values()]
    mixture(tokens(2, 8))
    assert calls == [1]
    assert "experts=('multiply', 'shift'), alpha=(6.0, 4.0)" in repr(mixture)


@BOTH
def test_restoring_gives_the_source_back(make):
    mixture = make()
    mixture(tokens(5, 8))
    plain = linear() if make is mixture_linear else seeded(Mlp())
    restored = mixture.restore_()
    assert restored is mixture
    assert type(restored) is (nn.Linear if make is mixture_linear else Mlp)
    assert restored.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(restored(tokens(5, 8)), plain(tokens(5, 8)))
    assert set(restored.__dict__) == set(plain.__dict__)
    assert set(restored._buffers) == set(plain._buffers) == set()


def test_conversion_draws_nothing_and_seeds_decide_the_router():
    state = torch.get_rng_state()
    first, same, other = (MixtureLinear.adopt_(nn.Linear(8, 6, device="meta"), seed=s).router for s in (0, 0, 1))
    assert first.weight.is_meta
    source = linear()
    state = torch.get_rng_state()
    first = MixtureLinear.adopt_(source, seed=0).router
    assert torch.equal(torch.get_rng_state(), state)
    same, other = mixture_linear(seed=0).router, mixture_linear(seed=1).router
    assert torch.equal(first.weight, same.weight)
    assert not torch.equal(first.weight, other.weight)


# --- use


@BOTH
def test_results_do_not_depend_on_token_order(make):
    mixture, x, order = make().double(), tokens(40, 8).double(), torch.randperm(40)
    torch.testing.assert_close(mixture(x[order]), mixture(x)[order], rtol=1e-12, atol=1e-12)
    assert 0 < mixture.share[0] < 1


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_models(make, dtype):
    mixture, x = make(), tokens(20, 8)
    expected = mixture(x)
    with torch.autocast("cpu", dtype):
        out = mixture(x)
        (out.float().sum() + sum(mixture.aux_losses().values())).backward()
    assert out.dtype == dtype
    same = (mixture.router(x).argmax(-1) == mixture.to(dtype).router(x.to(dtype)).argmax(-1)).unsqueeze(-1)
    assert same.sum() > 15
    tolerance = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(out.float() * same, expected * same, rtol=0, atol=tolerance)
    assert all(p.grad.isfinite().all() for p in mixture.parameters())
    assert mixture(x.to(dtype)).dtype == dtype
    assert mixture.share.dtype == torch.float32


@BOTH
def test_packing_keeps_the_outputs(make):
    mixture, x = make().eval(), tokens(20, 8)
    expected = mixture(x)
    mixture.pack_()
    mixture.pack_()
    assert torch.equal(mixture(x), expected)
    assert "shift.codes" in mixture.state_dict() or "shift.fc1.codes" in mixture.state_dict()
    assert "weight" in mixture.state_dict() or "fc1.weight" in mixture.state_dict()
    fresh = make(seed=5).eval()
    fresh.pack_()
    fresh.load_state_dict(mixture.state_dict())
    assert torch.equal(fresh(x), expected)


@BOTH
def test_copies_and_pickles_after_a_training_forward(make):
    mixture, x = make(), tokens(5, 8)
    out = mixture(x)
    for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert type(twin) is type(mixture)
        assert twin.aux_losses() == {}
        assert torch.equal(twin(x), out)
        assert set(twin.aux_losses()) == {"importance", "load"}
    assert mixture.aux_losses() != {}


@BOTH
def test_traced_and_exported_graphs_agree(make):
    mixture, x = make().eval(), tokens(2, 5, 8)
    expected = mixture(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(mixture)(x), expected)
    torch.testing.assert_close(torch.export.export(mixture, (x,)).module()(x), expected)


def test_a_third_expert():
    mixture, x = mixture_linear(experts=("multiply", "shift", "int8"), alpha=(6, 4, 5)), tokens(200, 8)
    assert list(mixture.experts()) == ["multiply", "shift", "int8"]
    assert isinstance(mixture.int8, IntLinear)
    out, index = mixture(x), mixture.router(x).argmax(-1)
    assert mixture.share.min() > 0
    torch.testing.assert_close(out[index == 2], mixture.int8(x)[index == 2])
    assert set(mixture.aux_losses()) == {"importance", "load"}


# --- refusals


def test_bad_settings_are_named_and_leave_the_module_alone():
    for settings, message in (
        ({"experts": ("multiply", "shft")}, "did you mean 'shift'"),
        ({"experts": ("shift", "multiply")}, "'multiply' comes first"),
        ({"experts": ("multiply",)}, "at least one other"),
        ({"alpha": (1, 2, 3)}, "3 latencies for 2 experts"),
        ({"balance": -1}, "not -1"),
        ({"load": "hart"}, "did you mean 'hard'"),
        ({"bits": 9}, "9"),
        ({"activations": "int4"}, "int4"),
        ({"experts": ("multiply", "int8"), "activations": "int8"}, "belong to the expert 'shift'"),
    ):
        source = linear()
        with pytest.raises(InputError, match=message):
            MixtureLinear.adopt_(source, **settings)
        assert type(source) is nn.Linear
        assert list(source.state_dict()) == ["weight", "bias"]


def test_modules_that_cannot_be_a_mixture_are_refused():
    class Own(Mlp):
        shift = None

    mixed = Mlp()
    mixed.norm = nn.BatchNorm1d(12)
    shifted = Mlp()
    ShiftLinear.adopt_(shifted.fc2)
    for module, message in (
        (nn.Sequential(nn.Linear(8, 8)), "Sequential is no MLP"),
        (nn.Linear(8, 8), "use MixtureLinear"),
        (nn.GELU(), "GELU is no MLP"),
        (mixed, r"norm \(BatchNorm1d\) mixes tokens"),
        (shifted, "holds a ShiftLinear"),
        (Own(), "already has 'shift'"),
        (mixture_mlp(), "holds a ShiftLinear"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            mixture_mlp_(module)
    with pytest.raises(UnsupportedError, match="ShiftLinear is not a plain"):
        MixtureLinear.adopt_(ShiftLinear.adopt_(linear()))
    assert isinstance(mixture_mlp(), MixtureMlp)
