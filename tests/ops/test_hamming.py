"""Hamming attention: the masked accumulation that defines it, its two orders, dtypes, masks, graphs and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops import hamming_attention
from vitrify.ops.hamming import reference

ORDERS = ("linear", "quadratic")


def codes_and_value(codes="binary", shape=(2, 3, 11, 7, 6, 5), *, seed=0, integer=False):
    """Return float64 codes (B, H, Nq, D), (B, H, Nk, D) and values (B, H, Nk, Dv); shape is (B, H, Nq, Nk, D, Dv)."""
    batch, heads, queries, keys, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def code(tokens):
        bits = torch.randint(0, 2, (batch, heads, tokens, dim), generator=generator).double()
        return bits if codes == "binary" else 2 * bits - 1

    value = torch.randn(batch, heads, keys, value_dim, generator=generator, dtype=torch.float64)
    return code(queries), code(keys), (value * 100).round() if integer else value


def definition(query_code, key_code, value, keep=None):
    """The triple sum, written out as one contraction."""
    if keep is not None:
        value = value.masked_fill(~keep[:, 0, 0, :, None].unsqueeze(1), 0)
    return torch.einsum("bhic,bhjc,bhjv->bhiv", query_code, key_code, value)


def padding():
    keep = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    keep[0, ..., [2, 5, 6]] = False
    return keep


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 3, 9, 9, 8, 6))),
    codes=st.sampled_from(["binary", "sign"]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
)
def test_integers_are_exact(shape, codes, order, seed):
    query, key, value = codes_and_value(codes, shape, seed=seed, integer=True)
    integers = [t.long() for t in (query, key, value)]
    expected = definition(*integers)
    assert torch.equal(reference.hamming_attention(*integers), expected)
    assert torch.equal(hamming_attention(query, key, value, order=order), expected.double())
    narrow = hamming_attention(query.to(torch.int8), key.float(), value.float(), order=order)
    assert torch.equal(narrow, expected.float())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_bool_codes_are_zeros_and_ones(order, masked):
    query, key, value = codes_and_value(integer=True)
    mask = padding() if masked else None
    out = hamming_attention(query.bool(), key.bool(), value, mask, order=order)
    assert torch.equal(out, definition(query, key, value, mask))
    keep = None if mask is None else mask[:, 0, 0]
    assert torch.equal(reference.hamming_attention(query.bool(), key.bool(), value, keep), out)


class Products(TorchDispatchMode):
    """Collects the names of the operations that multiply."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in func.name() for word in ("mul", "mm", "dot", "matmul", "einsum", "div", "pow")):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_reference_multiplies_nothing():
    inputs = codes_and_value("sign")
    with Products() as products:
        reference.hamming_attention(*inputs)
    assert products.found == []
    with products:
        hamming_attention(*inputs)
    assert products.found  # the collector does see products


@pytest.mark.parametrize("codes", ["binary", "sign"])
def test_orders_differ_by_rounding(codes):
    inputs = codes_and_value(codes, (2, 2, 50, 70, 16, 8))
    linear, quadratic = (hamming_attention(*inputs, order=order) for order in ORDERS)
    torch.testing.assert_close(linear, quadratic, rtol=0, atol=1e-11)
    torch.testing.assert_close(linear, definition(*inputs), rtol=0, atol=1e-11)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_once(dtype, order):
    query, key, value = (t.to(dtype) for t in codes_and_value("sign", (1, 2, 20, 300, 32, 8)))
    truth = definition(query.double(), key.double(), value.double())
    out = hamming_attention(query, key, value, order=order)
    assert out.dtype == dtype
    # Half a unit in the last place from the rounding, and a little from the sums in float32.
    error = (out.double() - truth).abs()
    assert (error <= 0.51 * torch.finfo(dtype).eps * truth.abs() + 1e-3).all()


def test_out_dtype_keeps_sums_that_float16_cannot():
    ones = torch.ones(1, 1, 64, 64, dtype=torch.float16)
    value = torch.full((1, 1, 64, 2), 20.0, dtype=torch.float16)
    assert hamming_attention(ones, ones, value).isinf().all()
    out = hamming_attention(ones, ones, value, out_dtype=torch.float32)
    assert torch.equal(out, torch.full((1, 1, 64, 2), 64 * 64 * 20.0))


@pytest.mark.parametrize("order", ORDERS)
def test_padding_may_hold_nan_and_counts_for_nothing(order):
    query, key, value = codes_and_value()
    mask = padding()
    expected = definition(query, key, value, mask)
    key, value = (t.masked_fill(~mask.transpose(2, 3), torch.nan) for t in (key, value))
    torch.testing.assert_close(hamming_attention(query, key, value, mask, order=order), expected, rtol=0, atol=1e-12)
    nothing = torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    assert torch.equal(hamming_attention(query, key, value, nothing, order=order), torch.zeros_like(expected))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "padded"])
def test_gradients(order, masked):
    inputs = [t.requires_grad_() for t in codes_and_value("sign", (2, 1, 4, 7, 3, 2))]
    mask = padding() if masked else None
    assert torch.autograd.gradcheck(lambda *t: hamming_attention(*t, mask, order=order), inputs)


def test_autocast_casts_as_sdpa_does():
    query, key, value = (t.float() for t in codes_and_value())
    with torch.autocast("cpu", torch.bfloat16):
        out = hamming_attention(query, key.bool(), value)
        assert hamming_attention(query.double(), key.double(), value.double()).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    expected = hamming_attention(*(t.bfloat16() for t in (query, key, value)))
    assert torch.equal(out, expected)


class Both(nn.Module):
    def forward(self, query, key, value):
        linear = hamming_attention(query, key, value)
        return linear + hamming_attention(query, key, value, order="quadratic", out_dtype=torch.float64)


def test_compiles_whole():
    inputs = [t.float().requires_grad_() for t in codes_and_value("sign")]
    module = Both()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))
    expected = torch.autograd.grad(module(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    torch.testing.assert_close(actual, expected)


def test_exports_for_any_number_of_tokens():
    inputs = tuple(t.float() for t in codes_and_value())
    keys = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("keys", min=2)}
    batch = {0: keys[0]}
    program = torch.export.export(Both(), inputs, dynamic_shapes=(batch, keys, keys))
    other = tuple(t.float() for t in codes_and_value(shape=(1, 3, 11, 13, 6, 5)))
    torch.testing.assert_close(program.module()(*other), Both()(*other))


def test_fx_sees_one_node_per_call():
    graph = torch.fx.symbolic_trace(Both())
    called = [n.target for n in graph.graph.nodes if n.op == "call_function"]
    assert called.count(hamming_attention) == 2
    inputs = codes_and_value()
    assert torch.equal(graph(*inputs), Both()(*inputs))


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("query_code", lambda t: t[0], "query_code must have 4 axes"),
        ("query_code", lambda t: t.tolist(), "query_code must be a Tensor, not list"),
        (
            "query_code",
            lambda t: t.float(),
            "query_code is float32: codes come as .*, as bits .uint8. or as value's float64",
        ),
        ("query_code", lambda t: t[:, :2], "query_code .* differ in batch or heads"),
        ("query_code", lambda t: t[..., :4], "query_code has 4 bits but key_code has 6"),
        ("key_code", lambda t: t[:, :, :5], "key_code .* differ in batch, heads or tokens"),
        ("key_code", lambda t: t.long(), "key_code is int64"),
        ("key_code", lambda t: t.to("meta"), "key_code is on meta but value is on cpu"),
        ("value", lambda t: t.long(), "value must be float16, .* not int64"),
        ("order", lambda _: "quadratc", "unknown order 'quadratc': did you mean 'quadratic'"),
        ("out_dtype", lambda _: torch.int32, "out_dtype must be float16, .* not torch.int32"),
        ("attn_mask", lambda _: torch.ones(2, 1, 1, 8, dtype=torch.bool), "attn_mask has shape .2, 1, 1, 8."),
        ("attn_mask", lambda _: [True], "attn_mask must be a bool Tensor or None"),
    ],
)
def test_errors_name_what_is_wrong(name, make, message):
    arguments = dict(zip(("query_code", "key_code", "value"), codes_and_value(), strict=True))
    arguments[name] = make(arguments.get(name))
    with pytest.raises(InputError, match=message):
        hamming_attention(**arguments)


def test_no_keys_is_an_error():
    query, key, value = codes_and_value()
    with pytest.raises(InputError, match="at least one key token"):
        hamming_attention(query, key[:, :, :0], value[:, :, :0])


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(7, 7), torch.ones(2, 1, 11, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)],
    ids=["additive", "per query", "two axes"],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(UnsupportedError, match=r"key-padding mask \(True = attend\) of shape \(2, 1, 1, 7\)"):
        hamming_attention(*codes_and_value(), mask)


@pytest.mark.parametrize("bad", [2.0, 0.5, -1.0])
def test_the_reference_checks_the_codes(bad):
    query, key, value = codes_and_value()
    query[0, 0, 0, 0], key[0, 0, 0, :2] = 1, torch.tensor([0.0, bad])
    with pytest.raises(InputError, match="key_code must hold 0 and 1, or -1 and"):
        reference.hamming_attention(query, key, value)
