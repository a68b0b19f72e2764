"""Decoded weights are kept, and never outlive what they were decoded from."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from vitrify.nn import ShiftConv2d, ShiftLinear
from vitrify.ops import pack_codes, shift_quantize
from vitrify.ops.shift import cache, cpu, reference

ACTIVATIONS = ["float", "int8", "float8"]
activations = pytest.mark.parametrize("activations", ACTIVATIONS)


def layer(kind: str = "float", seed: int = 0) -> ShiftLinear:
    linear = nn.Linear(13, 6)
    nn.init.normal_(linear.weight, 0, 0.1, generator=torch.Generator().manual_seed(seed))
    nn.init.normal_(linear.bias, 0, 0.1, generator=torch.Generator().manual_seed(seed))
    return ShiftLinear.adopt_(linear, activations=kind).pack_()


def tokens(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 13, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(shift: ShiftLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer by the reference, which keeps nothing."""
    return reference.linear(x, shift.codes, shift.exponent, shift.bias, shift.bits, shift.variant, shift.activations)


@pytest.fixture
def decoding(monkeypatch):
    """Count the calls that decode."""
    calls = []
    original = reference.decode
    monkeypatch.setattr(reference, "decode", lambda *args: calls.append(args) or original(*args))
    return calls


@activations
def test_a_weight_is_decoded_once_per_dtype(activations, decoding):
    shift, x = layer(activations), tokens()
    with torch.no_grad():
        shift(x), shift(x[:2])
        assert len(decoding) == 1
        with torch.inference_mode():
            shift(x)
        torch.compile(shift, fullgraph=True, backend="aot_eager")(x)
        assert len(decoding) == 1
        with torch.autocast("cpu", torch.bfloat16):
            shift(x), shift(x)
        shift(x)
    assert len(decoding) == (2 if activations == "float" else 1)


def test_a_packed_convolution_is_decoded_once(decoding):
    conv = ShiftConv2d.adopt_(nn.Conv2d(3, 4, 2)).pack_()
    x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = conv(x)
        assert torch.equal(conv(x), first)
    assert len(decoding) == 1
    assert torch.equal(first, torch.nn.functional.conv2d(x, conv.decoded_weight(), conv.bias))


@activations
def test_whatever_changes_the_codes_changes_the_result(activations):
    shift, other, x = layer(activations), layer(activations, seed=5), tokens()
    shift(x)
    shift.load_state_dict(other.state_dict())
    assert torch.equal(shift(x), expected(other, x))
    with torch.no_grad():
        shift.exponent.add_(1)
        assert torch.equal(shift(x), expected(shift, x))
        shift.codes[0, 0] ^= 1
        assert torch.equal(shift(x), expected(shift, x))
    assert not torch.equal(shift(x), other(x))
    shift.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(shift(x), expected(other, x))
    third = layer(activations, seed=6)
    shift.codes.data, shift.exponent.data = third.codes.clone(), third.exponent.clone()
    assert torch.equal(shift(x), expected(shift, x))
    shift.exponent = other.exponent.clone() + 1
    assert torch.equal(shift(x), expected(shift, x))


@activations
def test_copies_pickles_and_state_dicts_hold_codes_only(activations):
    shift, x = layer(activations), tokens()
    before = shift(x)
    assert sorted(shift.state_dict()) == ["bias", "codes", "exponent"]
    file = io.BytesIO()
    torch.save(shift, file)
    size = len(pickle.dumps(layer(activations)))
    assert len(pickle.dumps(shift)) == size
    file.seek(0)
    for again in (copy.deepcopy(shift), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(shift))):
        assert torch.equal(again(x), before)
        with torch.no_grad():
            again.codes.zero_()
        assert torch.equal(again(x), again.bias.expand_as(before))
    assert torch.equal(shift(x), before)


@activations
def test_casts_and_training_between_calls(activations):
    shift, x = layer(activations), tokens()
    shift(x)
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        shift.to(dtype)
        assert torch.equal(shift(x.to(dtype)), expected(shift, x.to(dtype)))
    with torch.inference_mode():
        shift(x)
    x.requires_grad_()
    optimizer = torch.optim.SGD(shift.parameters(), lr=1.0)
    shift(x).square().sum().backward()
    optimizer.step()
    assert x.grad.abs().sum() > 0
    assert torch.equal(shift(x), expected(shift, x))


def test_a_result_made_in_inference_mode_serves_autograd():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    codes, exponent = shift_quantize(weight)
    packed = pack_codes(codes)
    with torch.inference_mode():
        kept = cpu.weight(packed, exponent, 6, 4, "ps", torch.float32)
    assert kept is cpu.weight(packed, exponent, 6, 4, "ps", torch.float32)
    assert not kept.is_inference()
    with torch.inference_mode():
        assert cpu.weight(packed.clone(), exponent, 6, 4, "ps", torch.float32).equal(kept)


def test_entries_go_with_their_codes_and_with_casts():
    gc.collect()
    before = len(cache._entries)
    shift = layer()
    shift(tokens())
    assert len(cache._entries) == before + 1
    shift.half()
    assert len(cache._entries) == before
    shift.float()(tokens())
    assert len(cache._entries) == before + 1
    del shift
    gc.collect()
    assert len(cache._entries) == before


def test_meta_and_fake_layers_keep_nothing():
    before = len(cache._entries)
    with torch.device("meta"):
        conv = ShiftConv2d.adopt_(nn.Conv2d(3, 4, 2)).pack_()
        linear = ShiftLinear.adopt_(nn.Linear(13, 6)).pack_()
        assert conv(torch.randn(2, 3, 5, 5)).shape == (2, 4, 4, 4)
        assert linear(torch.randn(2, 13)).shape == (2, 6)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        conv = ShiftConv2d.adopt_(nn.Conv2d(3, 4, 2)).pack_()
        assert conv(torch.randn(2, 3, 5, 5)).shape == (2, 4, 4, 4)
    assert len(cache._entries) == before
