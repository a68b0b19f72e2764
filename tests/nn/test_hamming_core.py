"""The Hamming core: its two forms, what calibration fits, what it costs, what it refuses, and how it travels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrify.errors import InputError, UnsupportedError, VitrifyError
from vitrify.nn import Attention, Hamming, Taylor, calibrate_codes_, kernel_hash
from vitrify.ops import hamming_attention

SCALE = 0.35
FORMS = ("published", "taylor")
# Each form and each binariser once, where the two have nothing to do with each other.
VARIETY = (("published", "learned"), ("taylor", "token_mean"), ("taylor", "ksh"))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def tensors(queries=7, keys=7, *, dtype=torch.float64, seed=0, images=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, 8), (keys, 8), (keys, 5)
    return [torch.randn(images, 3, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def core(form="published", *, dtype=torch.float64, **options):
    """Return a core for 3 heads of 8 channels, its parameters drawn at random."""
    made = Hamming(3, 8, form=form, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.3, 0.2, generator=generator)
    return made


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Hashing is fitted in many tests here, and how well in none."""
    monkeypatch.setattr(kernel_hash, "STEPS", 3)


def padding():
    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    keep[0, ..., 4:] = False
    return keep


def codes_of(module, q, k):
    return module.query_binariser(q), (module.key_binariser or module.query_binariser)(k)


@pytest.mark.parametrize("codes", ["binary", "sign"])
@pytest.mark.parametrize("share", [False, True])
def test_published_form(codes, share):
    q, k, v = tensors()
    module = core(codes=codes, share=share)
    cq, ck = codes_of(module, q, k)
    x = v / 2 + cq @ (ck.mT @ v) / math.pi
    torch.testing.assert_close(module(q, k, v, scale=SCALE), x / x.norm(dim=-1, keepdim=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(module(q, k, v, scale=9.0), module(q, k, v, scale=SCALE))


@pytest.mark.parametrize("codes", ["binary", "sign"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
@pytest.mark.parametrize("queries", [7, 11])
def test_taylor_form_is_taylor_attention_of_the_codes(codes, masked, queries):
    """With the gain equal to the scale it *is* Taylor attention, of codes instead of queries and keys."""
    q, k, v = tensors(queries)
    module = core("taylor", codes=codes)
    nn.init.constant_(module.gain, SCALE)
    mask = padding() if masked else None
    if masked:
        k, v = (t.masked_fill(~mask.mT, torch.nan) for t in (k, v))
    cq, ck = codes_of(module, q, k)
    expected = Taylor()(cq, ck, v, mask, scale=SCALE)
    torch.testing.assert_close(module(q, k, v, mask, scale=SCALE), expected, rtol=0, atol=1e-12)
    nn.init.zeros_(module.gain)
    mean = v.mean(-2, keepdim=True) if mask is None else v.nansum(-2, keepdim=True) / mask.mT.sum(-2, keepdim=True)
    torch.testing.assert_close(module(q, k, v, mask, scale=SCALE), mean.expand_as(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("binariser", ["learned", "token_mean"])
def test_the_order_changes_rounding_only(form, binariser):
    q, k, v = tensors()
    linear = core(form, binariser=binariser)
    quadratic = core(form, binariser=binariser, order="quadratic")
    expected = linear(q, k, v, scale=SCALE)
    torch.testing.assert_close(quadratic(q, k, v, scale=SCALE), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_codes_all_zero_do_not_give_nan(form, value):
    q, k, v = tensors()
    module = core(form)
    for parameter in (module.query_binariser.threshold, module.key_binariser.threshold):
        nn.init.constant_(parameter, 1e9)
    v = (v * value).requires_grad_()
    out = module(q.requires_grad_(), k, v, scale=SCALE)
    expected = F.normalize(v, dim=-1) if form == "published" else v.mean(-2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    assert v.grad.isfinite().all()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("binariser", ["learned", "token_mean", "ksh"])
def test_an_image_does_not_depend_on_its_neighbours(form, binariser):
    module = core(form, binariser=binariser)
    module.calibrate_(*tensors(30, 30, seed=8)[:2], scale=SCALE)
    alone, crowd = tensors(), tensors(seed=5)
    mixed = [torch.cat((a[:1], 10 * b + 3)) for a, b in zip(alone, crowd, strict=True)]
    torch.testing.assert_close(module(*mixed, scale=SCALE)[:1], module(*alone, scale=SCALE)[:1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_inputs_and_parameters(form):
    inputs = [t.requires_grad_() for t in tensors()]
    module = core(form)
    module(*inputs, scale=SCALE)[..., 0].sum().backward()
    for tensor in (*inputs, *module.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.abs().max() > 1e-6
    # V's gradient is exact, whatever the codes' is.
    q, k, v = tensors()
    assert torch.autograd.gradcheck(lambda v: module(q, k, v, scale=SCALE), v.requires_grad_())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_do_not_overflow(form, dtype):
    """4,096 tokens: the sum passes float16's largest number, 65,504; the result does not."""
    q = torch.ones(1, 3, 4096, 8, dtype=dtype)
    k = torch.where(torch.arange(4096) % 2 == 0, 1.0, -1.0).to(dtype).view(1, 1, -1, 1).expand_as(q)
    v = 10 * k[..., :5]
    assert hamming_attention(q, (k > 0).to(dtype), v, out_dtype=torch.float64).min() == 2048 * 8 * 10
    module = Hamming(3, 8, form=form)
    for run in (module.to(dtype), copy.deepcopy(module).float()):
        with torch.autocast("cpu", dtype, enabled=run is not module):
            out = run(q, k, v, scale=SCALE)
        assert out.dtype == dtype
        truth = copy.deepcopy(module).double()(q.double(), k.double(), v.double(), scale=SCALE)
        torch.testing.assert_close(out.double(), truth, rtol=torch.finfo(dtype).eps, atol=0)


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


@pytest.mark.parametrize("form", FORMS)
def test_refuses_what_it_cannot_carry(form):
    q, k, v = tensors()
    module = core(form)
    with pytest.raises(UnsupportedError, match="is_causal"):
        module(q, k, v, scale=SCALE, is_causal=True)
    with pytest.raises(UnsupportedError, match=r"dropout 0\.1"):
        module(q, k, v, scale=SCALE, dropout_p=0.1)
    with pytest.raises(UnsupportedError, match="key-padding"):
        module(q, k, v, torch.zeros(7, 7), scale=SCALE)
    bias = torch.randn(3, 7, 7, dtype=q.dtype)
    with pytest.raises(UnsupportedError, match="bias='drop'"):
        module(q, k, v, scale=SCALE, bias=bias)
    module.bias = "drop"
    assert torch.equal(module(q, k, v, scale=SCALE, bias=bias), module(q, k, v, scale=SCALE))
    with pytest.raises(InputError, match="num_heads and head_dim"):
        module(q[..., :4], k[..., :4], v, scale=SCALE)


def test_published_form_needs_a_value_for_each_query():
    with pytest.raises(UnsupportedError, match=r"11 queries and 7 keys: .* form='taylor'.* spatial reduction"):
        core()(*tensors(11), scale=SCALE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "cubic"}, "unknown order 'cubic'"),
        ({"form": "tailor"}, "unknown form 'tailor': did you mean 'taylor'"),
        ({"binariser": "learn"}, "unknown binariser 'learn': did you mean 'learned'"),
        ({"codes": "ternary"}, "unknown codes 'ternary'"),
    ],
)
def test_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        Hamming(3, 8, **options)


def test_state_is_what_is_learned():
    assert set(Hamming(3, 8).state_dict()) == {"query_binariser.threshold", "key_binariser.threshold"}
    assert set(Hamming(3, 8, share=True, form="taylor").state_dict()) == {"query_binariser.threshold", "gain"}
    assert not Hamming(3, 8, binariser="token_mean").state_dict()
    hashed = Hamming(3, 8, binariser="ksh", share=True)
    assert set(hashed.state_dict()) == {f"query_binariser.{n}" for n in ("anchors", "width", "mean", "weight")}
    assert not list(hashed.parameters())
    on_meta = Hamming(3, 8, form="taylor", device=torch.device("meta"), dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in on_meta.parameters()} == {("meta", torch.bfloat16)}


def test_costs():
    sizes = (11, 7, 8, 5)
    assert Hamming(3, 8).multiplications(*sizes) == 0
    assert Hamming(3, 8, form="taylor").multiplications(*sizes) == 0
    assert Hamming(3, 8, order="quadratic").multiplications(*sizes) == 11 * 7 * 5
    hashing = (11 + 7) * 25 * (8 + 16)
    assert Hamming(3, 8, binariser="ksh").multiplications(*sizes) == hashing
    assert Hamming(3, 8, binariser="ksh", share=True).multiplications(*sizes) == hashing
    # Binarising compares each channel of each token once.
    assert Hamming(3, 8).additions(*sizes) == 18 * 8 * 5 + 11 * 5 + 18 * 8
    assert Hamming(3, 8, form="taylor").additions(*sizes) == 18 * 8 * 5 + (11 + 14) * 5 + 18 * 8
    assert Hamming(3, 8, order="quadratic").additions(*sizes) == 77 * 13 + 11 * 5 + 18 * 8
    assert Hamming(3, 8, binariser="ksh").additions(*sizes) > 18 * 16 * 5 + 11 * 5


@pytest.mark.parametrize(("form", "binariser"), VARIETY)
def test_compiles_whole(form, binariser):
    inputs = [t.requires_grad_() for t in tensors(dtype=torch.float32)]
    module = core(form, binariser=binariser, dtype=torch.float32)
    if binariser == "ksh":
        module.calibrate_(*(t.detach() for t in tensors(30, 30, dtype=torch.float32)[:2]), scale=SCALE)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, actual = module(*inputs, scale=SCALE), compiled(*inputs, scale=SCALE)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.square().sum(), inputs[:2]),
        torch.autograd.grad(expected.square().sum(), inputs[:2]),
    )


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, query, key, value):
        return self.inner(query, key, value, scale=SCALE)


@pytest.mark.parametrize(("form", "binariser"), VARIETY)
def test_exports_and_traces(form, binariser):
    module = core(form, binariser=binariser, dtype=torch.float32)
    module.calibrate_(*tensors(30, 30, dtype=torch.float32)[:2], scale=SCALE)
    module = Scaled(module).eval()
    inputs, other = tuple(tensors(dtype=torch.float32)), tensors(13, 13, dtype=torch.float32, images=1)
    axes = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("tokens", min=2)}
    program = torch.export.export(module, inputs, dynamic_shapes=(axes, axes, axes))
    torch.testing.assert_close(program.module()(*other), module(*other))
    torch.testing.assert_close(torch.jit.trace(module, inputs)(*other), module(*other))
    torch.testing.assert_close(torch.fx.symbolic_trace(module)(*other), module(*other))
