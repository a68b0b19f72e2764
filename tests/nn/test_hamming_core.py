"""The Hamming core: its two forms, what it costs, what it refuses, and how it travels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hamming_inputs import SCALE, codes_of, core, padding, tensors
from torch import nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import Hamming, Taylor, kernel_hash
from vitrify.ops import hamming_attention

FORMS = ("published", "taylor")
# Each form and each binariser once, where the two have nothing to do with each other.
VARIETY = (("published", "learned"), ("taylor", "token_mean"), ("taylor", "ksh"))


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Hashing is fitted in many tests here, and how well in none."""
    monkeypatch.setattr(kernel_hash, "STEPS", 3)


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
