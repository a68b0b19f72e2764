"""Calibrated rounding: its gain on correlated inputs, what it leaves alone, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitrify.errors import InputError
from vitrify.nn import ShiftConv2d, ShiftLinear, calibrate_shift_

WIDTH, OUT = 96, 40


def inputs(tokens: int, seed: int) -> torch.Tensor:
    """Return (1, tokens, WIDTH) with the covariance of 12 common factors and a little noise."""
    mix = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(1, tokens, 12, generator=generator)
    return factors @ mix + 0.2 * torch.randn(1, tokens, WIDTH, generator=generator)


def linear(seed: int = 0) -> nn.Linear:
    layer = nn.Linear(WIDTH, OUT)
    nn.init.normal_(layer.weight, 0, 0.05, generator=torch.Generator().manual_seed(seed))
    return layer


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("bits", "variant"), [(3, "ps"), (3, "q"), (4, "ps"), (4, "q"), (5, "ps"), (6, "q")])
def test_the_gain_on_correlated_inputs_holds_on_others(bits, variant):
    layer = linear()
    with torch.no_grad():
        layer.bias.zero_()
    shift, weight_error = ShiftLinear.from_linear(layer, bits, variant)
    new = inputs(500, seed=2)
    expected = layer(new)
    plain = relative(shift(new), expected)
    ((before, after),) = calibrate_shift_(shift, [inputs(400, seed=1), inputs(400, seed=3)]).values()
    calibrated = relative(shift(new), expected)
    assert before == pytest.approx(plain, rel=0.1)
    assert after == pytest.approx(calibrated, rel=0.15)
    assert calibrated < 0.4 * plain
    assert shift.quantization_error() == 0  # the latent weight is the decoded one
    assert relative(shift.weight, layer.weight) > weight_error * 0.8  # the output got better, not the weight


def test_independent_inputs_cannot_get_worse():
    shift, _ = ShiftLinear.from_linear(linear(), 4)
    x = torch.randn(2000, WIDTH, generator=torch.Generator().manual_seed(5))
    ((before, after),) = calibrate_shift_(shift, [x]).values()
    assert after <= before


def test_fewer_tokens_than_inputs_and_dead_inputs():
    shift, _ = ShiftLinear.from_linear(linear(), 4)
    x = inputs(10, seed=1)
    x[..., 7] = 0
    ((before, after),) = calibrate_shift_(shift, [x]).values()
    assert after < before
    assert shift.weight.isfinite().all()


def test_packing_after_calibration_keeps_the_output():
    shift, _ = ShiftLinear.from_linear(linear(), 4)
    x = inputs(200, seed=1)
    calibrate_shift_(shift, [x])
    expected = shift(x)
    assert torch.equal(shift.pack_()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_models(dtype):
    shift, _ = ShiftLinear.from_linear(linear().to(dtype), 4)
    ((before, after),) = calibrate_shift_(shift, [inputs(200, seed=1).to(dtype)]).values()
    assert after < 0.5 * before
    assert shift.weight.dtype == dtype
    assert shift.quantization_error() == 0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ShiftConv2d.adopt_(nn.Conv2d(1, 1, 1))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.first = ShiftLinear.adopt_(linear())
        self.never = ShiftLinear.adopt_(linear(1))
        self.plain = nn.Linear(OUT, 2)

    def forward(self, x, scale=1.0):
        x = self.stem(x[:, None])[:, 0] * scale
        return self.plain(self.first(self.norm(x.flatten(0, 1))))


@pytest.mark.parametrize(
    "batch", [inputs(50, 1), (inputs(50, 1), 2.0), {"x": inputs(50, 1), "scale": 2.0}], ids=["tensor", "tuple", "dict"]
)
def test_a_whole_model(batch):
    model = Model().train()
    model.stem.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    errors = calibrate_shift_(model, [batch])
    assert list(errors) == ["first"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])]
    assert changed == ["first.weight"]  # batch norm's statistics too are as they were
    assert (model.training, model.stem.training, model.first.training) == (True, False, True)
    assert not model.first._forward_pre_hooks
    assert model.first.weight.requires_grad


def test_bad_input_is_named():
    with pytest.raises(InputError, match="Linear has no ShiftLinear to calibrate: convert"):
        calibrate_shift_(linear(), [inputs(5, 1)])
    with pytest.raises(InputError, match="batches is empty"):
        calibrate_shift_(Model(), [])
    with pytest.raises(InputError, match="first hold NaN or inf"):
        calibrate_shift_(Model(), [inputs(5, 1) * float("inf")])
    model = Model()
    model.never.pack_()
    with pytest.raises(InputError, match=r"never is packed, .* calibrate before pack_"):
        calibrate_shift_(model, [inputs(5, 1)])
