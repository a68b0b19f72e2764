"""What calibration fits in a Hamming core, and through a whole model."""

from __future__ import annotations

import math

import pytest
import torch
from hamming_inputs import SCALE, codes_of, core, tensors
from torch import nn

from vitrify.errors import InputError, UnsupportedError, VitrifyError
from vitrify.nn import Attention, Hamming, Taylor, calibrate_codes_, kernel_hash


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Hashing is fitted in many tests here, and how well in none."""
    monkeypatch.setattr(kernel_hash, "STEPS", 3)


def related(images=6, tokens=40, seed=0):
    """Return queries and keys of related tokens, keys with a large offset in common."""
    x = tensors(tokens, tokens, images=images, seed=seed)[0]
    mixing = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    return x + 0.3, x @ mixing + 5


@pytest.mark.parametrize("binariser", ["learned", "token_mean", "ksh"])
@pytest.mark.parametrize("codes", ["binary", "sign"])
def test_calibration_fits_the_gain_by_least_squares(binariser, codes):
    q, k = related()
    module = core("taylor", binariser=binariser, codes=codes)
    fit = module.calibrate_(q, k, scale=SCALE)
    cq, ck = codes_of(module, q, k)
    logits = SCALE * q @ (k - k.mean(-2, keepdim=True)).mT
    products = cq @ (ck - ck.mean(-2, keepdim=True)).mT
    for head in range(3):
        x, y = products[:, head].flatten(), logits[:, head].flatten()
        torch.testing.assert_close(module.gain[head].item(), (x @ y / (x @ x)).item())
        explained = 1 - (y - module.gain[head].item() * x).square().sum() / y.square().sum()
        torch.testing.assert_close(fit[head].item(), explained.item())


def test_calibration_starts_close_to_taylor():
    q, k = related(seed=2)
    v = tensors(40, 40, images=6)[2]
    module = Hamming(3, 8, form="taylor", codes="sign", dtype=torch.float64)
    taylor = Taylor()(q, k, v, scale=SCALE)

    def error():
        return (module(q, k, v, scale=SCALE) - taylor).norm() / (taylor - v.mean(-2, keepdim=True)).norm()

    before = error()
    module.calibrate_(*related(seed=0), scale=SCALE)  # on other images
    assert error() < 0.8  # what is expected of independent Gaussian channels: sqrt(1 - (2 / pi)^2) = 0.77
    # Uncalibrated thresholds lie outside the offset keys: every code alike, which leaves the mean of V.
    assert before > 0.95


def test_gaussian_gain_is_the_xnor_estimate():
    """For independent Gaussian queries and keys least squares is scale E|q| E|k|, and explains (2 / pi)^2."""
    q, k, _ = tensors(64, 64, images=40)
    module = Hamming(3, 8, form="taylor", codes="sign", dtype=torch.float64)
    fit = module.calibrate_(q, k, scale=SCALE)
    torch.testing.assert_close(module.gain.mean().item(), SCALE * 2 / math.pi, rtol=0.02, atol=0)
    torch.testing.assert_close(fit.mean().item(), (2 / math.pi) ** 2, rtol=0.05, atol=0)


def test_calibration_without_anything_to_fit_keeps_the_gain():
    module = Hamming(3, 8, form="taylor")
    ones = torch.ones(2, 3, 9, 8)
    assert torch.equal(module.calibrate_(ones, ones, scale=SCALE), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(module.gain.flatten(), torch.full((3,), 8**-0.5))


class Model(nn.Module):
    """Two blocks of attention on tokens (B, N, 24), with dropout to tell training from evaluation."""

    def __init__(self, **options):
        super().__init__()
        cores = (Hamming(3, 8, form="taylor", codes="sign", **options) for _ in range(2))
        self.blocks = nn.ModuleList(Attention(24, 3, core) for core in cores)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in self.blocks.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x, attn_mask=None):
        for block in self.blocks:
            x = x + block(self.dropout(x), attn_mask)
        return x


def images(seed=0):
    return torch.randn(4, 20, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("binariser", ["learned", "ksh"])
def test_calibrates_every_core_after_those_before_it(binariser):
    model = Model(binariser=binariser).train()
    model.blocks[1].eval()
    if binariser == "ksh":
        with pytest.raises(VitrifyError, match="calibrate_codes_"):
            model(images())
    fits = calibrate_codes_(model, images())
    assert list(fits) == ["blocks.0.core", "blocks.1.core"]
    assert all(0.05 < fit < 1 for fit in fits.values())
    assert [m.training for m in (model, model.dropout, model.blocks[0], model.blocks[1])] == [True, True, True, False]
    # Again, by hand: the second core's inputs are what the calibrated first one lets through.
    seen = []
    model.eval()
    hook = model.blocks[1].core.register_forward_pre_hook(lambda m, args: seen.append(args))
    model(images())
    hook.remove()
    again = Hamming(3, 8, form="taylor", codes="sign", binariser=binariser)
    again.calibrate_(seen[0][0], seen[0][1], scale=8**-0.5)
    torch.testing.assert_close(again.state_dict(), model.blocks[1].core.state_dict())
    # The state dict holds all of it.
    fresh = Model(binariser=binariser).eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images(1)), model(images(1)))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_calibration_refuses_what_it_cannot_use():
    with pytest.raises(InputError, match="Linear has no Hamming core to calibrate"):
        calibrate_codes_(nn.Linear(2, 2), torch.zeros(1, 2))
    model = Model()
    masked = nn.Module()
    masked.model = model
    masked.forward = lambda x: model(x, torch.ones(4, 1, 1, 20, dtype=torch.bool))
    with pytest.raises(UnsupportedError, match="without padding"):
        calibrate_codes_(masked, images())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("form", ["published", "taylor"])
@pytest.mark.parametrize("binariser", ["learned", "token_mean", "ksh"])
def test_what_still_needs_calibration(form, binariser):
    module = Hamming(3, 8, form=form, binariser=binariser, dtype=torch.float64)
    assert module.needs_calibration() == (form == "taylor" or binariser != "token_mean")
    module.calibrate_(*related(), scale=SCALE)
    assert not module.needs_calibration()


def test_calibrating_what_needs_it_leaves_the_rest_alone():
    model = nn.Sequential(*(Attention(24, 3, core=Hamming(3, 8, form="taylor")) for _ in range(2)))
    x = torch.randn(4, 20, 24, generator=torch.Generator().manual_seed(0))
    model[0].core.gain.data.fill_(0.7)  # as if trained
    assert list(calibrate_codes_(model, x, again=False)) == ["1.core"]
    assert (model[0].core.gain == 0.7).all()
    assert calibrate_codes_(model, x, again=False) == {}
    assert list(calibrate_codes_(model, x)) == ["0.core", "1.core"]
