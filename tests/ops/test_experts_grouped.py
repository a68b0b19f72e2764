"""Two experts on tokens grouped on the device: the definition's rows, whatever runs it; registered, and checked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from experts_inputs import PATTERNS, experts_of, pattern, routed
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops.experts import Codes, Groups, dense, group_tokens, grouped_linear, groups_of, kernels_take, route
from vitrify.ops.shift import pack_codes, shift_decode, shift_linear, shift_quantize

WIDTH, OUT = 9, 5


def layers(bits=4, variant="ps", dtype=torch.float64):
    """Return weight, bias, codes, the decoded weight, and the shift expert's bias."""
    generator = torch.Generator().manual_seed(bits)
    weights, biases = torch.randn(2, OUT, WIDTH, generator=generator), torch.randn(2, OUT, generator=generator)
    codes, exponent = shift_quantize(weights[1], bits, variant)
    packed = Codes(pack_codes(codes, bits), exponent, bits, variant)
    decoded = shift_decode(codes, exponent, bits, variant).to(dtype)
    return weights[0].to(dtype), biases[0].to(dtype), packed, decoded, biases[1].to(dtype)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1), max_size=40))
def test_groups_are_a_stable_partition_by_the_routers_choice(choices):
    x, router = routed(torch.tensor(choices, dtype=torch.int64), WIDTH, torch.float32)
    order, counts = group_tokens(x, *router)
    index, _ = route(F.linear(x, *router))
    assert index.tolist() == choices
    assert order.dtype == counts.dtype == torch.int32
    assert order.tolist() == index.argsort(stable=True).tolist()
    assert counts.tolist() == [choices.count(0), choices.count(1)]
    again = groups_of(index)
    assert torch.equal(again.order, order)
    assert torch.equal(again.counts, counts)
    assert again.order.dtype == again.counts.dtype == torch.int32


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(("bits", "variant"), [(4, "ps"), (3, "q"), (6, "q")])
@pytest.mark.parametrize("tokens", [1, 63, 197])
def test_rows_are_the_definitions(name, bits, variant, tokens):
    index = pattern(name, tokens)
    x, router = routed(index, WIDTH, torch.float64)
    weight, bias, codes, decoded, shift_bias = layers(bits, variant)
    groups = group_tokens(x, *router)
    truth = dense(x, index, experts_of(weight, bias, decoded, shift_bias))
    for shift in (codes, decoded):
        out = grouped_linear(x, groups, weight, bias, shift, shift_bias, gather=True, scatter=True)
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    ordered = grouped_linear(x, groups, weight, bias, codes, shift_bias, gather=True, scatter=False)
    torch.testing.assert_close(ordered, truth[groups.order.long()], rtol=1e-12, atol=1e-12)
    gathered = x[groups.order.long()]
    out = grouped_linear(gathered, groups, weight, bias, codes, shift_bias, gather=False, scatter=True)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activations", ["int8", "float8"])
def test_only_the_second_experts_tokens_are_rounded(activations):
    x, router = routed(pattern("random", 63), WIDTH, torch.float32)
    weight, bias, codes, _, shift_bias = layers(dtype=torch.float32)
    rounding = codes._replace(activations=activations)
    groups = group_tokens(x, *router)
    out, plain = (
        grouped_linear(x, groups, weight, bias, shift, shift_bias, gather=True, scatter=True)
        for shift in (rounding, codes)
    )
    first, second = groups.order.long().split(groups.counts.tolist())
    expected = shift_linear(x[second], codes.codes, codes.exponent, shift_bias, activations=activations)
    torch.testing.assert_close(out[second], expected)
    assert torch.equal(out[first], plain[first])
    assert not torch.equal(out[second], plain[second])


@pytest.mark.parametrize("activations", ["float", "int8", "float8"])
def test_opcheck(activations):
    x, router = routed(pattern("random", 12), WIDTH, torch.float32)
    weight, bias, codes, _, shift_bias = layers(dtype=torch.float32)
    order, counts = group_tokens(x, *router)
    torch.library.opcheck(torch.ops.vitrify.mixture_order.default, (x, *router))
    layer = (weight, bias, codes.codes, codes.exponent, shift_bias, 4, "ps", activations)
    arguments = (x, order, counts, *layer, True, False)
    torch.library.opcheck(torch.ops.vitrify.mixture_linear.default, arguments)


@pytest.mark.parametrize(("gather", "scatter"), [(True, False), (False, True)])
def test_opcheck_of_gradients(gather, scatter):
    x, router = routed(pattern("random", 12), WIDTH, torch.float32)
    groups = group_tokens(x, *router)
    weight, bias, _, shift, shift_bias = layers(dtype=torch.float32)
    x, weight, bias, shift, shift_bias = (t.requires_grad_() for t in (x, weight, bias, shift, shift_bias))
    layer = (weight, bias, shift, None, shift_bias, 4, "ps", "float")
    torch.library.opcheck(torch.ops.vitrify.mixture_linear.default, (x, *groups, *layer, gather, scatter))
    grad = torch.randn(12, OUT)
    for trained in (1, 2):
        arguments = (grad, x.detach(), *groups, gather, scatter, trained)
        torch.library.opcheck(torch.ops.vitrify.mixture_gradient.default, arguments)


WAYS = pytest.mark.parametrize(("gather", "scatter"), [(True, True), (True, False), (False, True), (False, False)])


@WAYS
@pytest.mark.parametrize("name", ["random", "first", "second"])
def test_gradients_are_the_definitions(name, gather, scatter):
    """Of every input; an expert without tokens gets zeros."""
    index = pattern(name, 23)
    x, _ = routed(index, WIDTH, torch.float64)
    weight, bias, _, shift, shift_bias = layers()
    groups = groups_of(index)
    inputs = [t.requires_grad_() for t in (x, weight, bias, shift, shift_bias)]
    places = groups.order.long()
    factors = torch.randn(23, OUT, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = dense(x if gather else x.new_zeros(x.shape).index_copy(0, places, x), index, experts_of_both(*inputs[1:]))
    expected = torch.autograd.grad(((truth if scatter else truth[places]) * factors).sum(), inputs)
    out = grouped_linear(x, groups, weight, bias, shift, shift_bias, gather=gather, scatter=scatter)
    found = torch.autograd.grad((out * factors).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def experts_of_both(weight, bias, shift, shift_bias):
    return [lambda x: F.linear(x, weight, bias), lambda x: F.linear(x, shift, shift_bias)]


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("biased", [True, False])
def test_gradients_with_frozen_codes(biased, activations):
    """Of all but the codes; activations that they round get the gradient that floats would have had."""
    index = pattern("random", 23)
    x, _ = routed(index, WIDTH, torch.float64)
    weight, bias, codes, shift, shift_bias = layers()
    inputs = [t.requires_grad_() for t in (x, weight, *(bias, shift_bias) * biased)]
    bias, shift_bias = (bias, shift_bias) if biased else (None, None)
    truth = dense(x, index, experts_of_both(weight, bias, shift, shift_bias))
    expected = torch.autograd.grad(truth.sum(), inputs)
    rounding = codes._replace(activations=activations)
    out = grouped_linear(x, groups_of(index), weight, bias, rounding, shift_bias, gather=True, scatter=True)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs), expected, rtol=1e-12, atol=1e-12)


@WAYS
def test_gradcheck(gather, scatter):
    x, _ = routed(pattern("random", 7), WIDTH, torch.float64)
    weight, bias, _, shift, shift_bias = layers()
    inputs = [t.requires_grad_() for t in (x, weight, bias, shift, shift_bias)]
    groups = groups_of(pattern("random", 7))

    def run(x, weight, bias, shift, shift_bias):
        return grouped_linear(x, groups, weight, bias, shift, shift_bias, gather=gather, scatter=scatter)

    assert torch.autograd.gradcheck(run, inputs)


def test_only_what_is_asked_for():
    x, _ = routed(pattern("random", 12), WIDTH, torch.float64)
    weight, bias, _, shift, shift_bias = layers()
    for chosen in (x, weight, bias, shift, shift_bias):
        chosen.requires_grad_()
        out = grouped_linear(
            x, groups_of(pattern("random", 12)), weight, bias, shift, shift_bias, gather=True, scatter=True
        )
        (grad,) = torch.autograd.grad(out.sum(), [chosen])
        assert grad.shape == chosen.shape
        chosen.requires_grad_(False)


def test_asking_for_other_gradients_is_an_error():
    x, router = routed(pattern("random", 12), WIDTH, torch.float64)
    weight, bias, codes, _, shift_bias = layers()
    groups = group_tokens(x.requires_grad_(), *router)
    assert not any(t.requires_grad for t in groups)
    out = grouped_linear(x, groups, weight.requires_grad_(), bias, codes, shift_bias, gather=True, scatter=True)
    (grad,) = torch.autograd.grad(out.square().sum(), [weight], create_graph=True)
    with pytest.raises(UnsupportedError, match=r"no second derivative: use ops\.dispatch"):
        grad.sum().backward()


def test_what_does_not_fit_is_named():
    x, router = routed(pattern("random", 12), WIDTH, torch.float32)
    weight, bias, codes, decoded, shift_bias = layers(dtype=torch.float32)
    groups = group_tokens(x, *router)

    def run(x=x, groups=groups, weight=weight, bias=bias, shift=codes, shift_bias=shift_bias):
        grouped_linear(x, groups, weight, bias, shift, shift_bias, gather=True, scatter=True)

    for change, message in (
        ({"x": x[None]}, r"the multiplying expert has weight \(5, 9\), which does not fit tokens \(1, 12, 9\)"),
        ({"x": x[:, :8]}, r"does not fit tokens \(12, 8\)"),
        ({"x": x.double()}, "is torch.float32 on cpu, but x is torch.float64 on cpu"),
        ({"bias": bias[:3]}, r"the multiplying expert has bias \(3,\) for 5 outputs"),
        ({"shift_bias": shift_bias[:3]}, r"the shift expert has bias \(3,\) for 5 outputs"),
        ({"shift_bias": shift_bias.double()}, "the shift expert is torch.float64 on cpu"),
        ({"bias": None}, "give both or neither"),
        ({"shift": decoded[:4]}, "have 5 and 4 outputs"),
        ({"shift": codes._replace(codes=codes.codes[:4], exponent=codes.exponent[:4])}, "have 5 and 4 outputs"),
        ({"shift": codes._replace(codes=codes.codes[:, 1:])}, "packed into 5 bytes"),
        ({"shift": codes._replace(exponent=codes.exponent[1:])}, r"exponent has shape \(4,\)"),
        ({"shift": codes._replace(variant="sp")}, "did you mean 'ps'"),
        ({"shift": codes._replace(activations="int4")}, "did you mean 'int8'"),
        ({"groups": Groups(groups.order[1:], groups.counts)}, "groups are of 11 tokens"),
        ({"groups": Groups(groups.order.to("meta"), groups.counts)}, "groups is on meta but x is on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            run(**change)
    with pytest.raises(InputError, match="the router has 3 outputs"):
        group_tokens(x, torch.zeros(3, WIDTH), None)


def test_which_tensors_the_kernels_take():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert not kernels_take(torch.device("cpu"), torch.bfloat16)
    assert not kernels_take(torch.device("meta"), torch.float16)
    assert not kernels_take(torch.device("cuda"), torch.float64)
    if not torch.cuda.is_available():
        assert kernels_take(torch.device("cuda"), torch.bfloat16)
        assert kernels_take(torch.device("cuda"), torch.float32)
