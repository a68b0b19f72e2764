"""`taylor_attention` on every backend against Algorithm 1 in float64: shapes, dtypes, strides, masks, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taylor_inputs import assert_as_good_as, packed, padding, qkv

from vitrify.errors import InputError
from vitrify.ops import backends, taylor_attention
from vitrify.ops.taylor import aten, cpu, reference

FAST = ("cpu", "aten")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth_and_plain(inputs, keep=None, scale=None):
    """Return Algorithm 1 of the given inputs in float64, and in float32 (float64 for float64 inputs)."""
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    return tuple(reference.algorithm1(*(t.to(d) for t in inputs), keep, scale) for d in (torch.float64, wide))


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 197, 577, 1000])
def test_matches_float64(backend, dtype, tokens):
    inputs = [t.to(dtype) for t in packed(*qkv(2, 3, tokens, tokens, 32, 32, seed=tokens))]
    truth, plain = truth_and_plain(inputs)
    assert_as_good_as(taylor_attention(*inputs, backend=backend), plain, truth)


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "contiguous", "channels_strided", "expanded"])
@pytest.mark.parametrize("shape", [(3, 2, 50, 50, 16, 16), (2, 4, 50, 50, 16, 16)], ids=["more_images", "more_heads"])
def test_any_strides(dtype, layout, shape):
    inputs = [t.to(dtype) for t in qkv(*shape)]
    if layout == "packed":
        inputs = packed(*inputs)
    elif layout == "channels_strided":
        inputs = [t.mT.contiguous().mT for t in inputs]
    elif layout == "expanded":
        inputs = [t[:1, :1].expand_as(t) for t in inputs]
    truth, plain = truth_and_plain(inputs)
    assert_as_good_as(taylor_attention(*inputs), plain, truth)


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("backend", FAST)
def test_blocks_add_up(monkeypatch, backend, dtype, masked):
    """Several blocks with a short last one, values wider than keys, more queries than keys; and every gradient."""
    monkeypatch.setattr(cpu, "BLOCK", 1)  # the smallest block, 64 tokens
    inputs = [t.to(dtype) for t in qkv(2, 3, 333, 150, 8, 20)]
    mask = padding(2, 150) if masked else None
    keep = None if mask is None else mask[:, 0, 0]
    truth, plain = truth_and_plain(inputs, keep)
    grad = torch.randn_like(truth).to(dtype)

    def gradients(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    def algorithm1(q, k, v):
        return reference.algorithm1(q, k, v, keep, 8**-0.5)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_as_good_as(taylor_attention(*inputs, mask, backend=backend), plain, truth)
    actual = gradients(lambda q, k, v: taylor_attention(q, k, v, mask, backend=backend), dtype)
    for a, p, t in zip(actual, gradients(algorithm1, wide), gradients(algorithm1, torch.float64), strict=True):
        assert a.dtype == dtype
        assert_as_good_as(a, p, t)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("shape", [(2, 2, 5, 5, 3, 3), (2, 1, 6, 4, 3, 2), (1, 2, 3, 7, 2, 4)], ids=str)
def test_gradcheck(backend, shape, masked):
    mask = padding(shape[0], shape[3]) if masked else None
    inputs = [t.requires_grad_() for t in qkv(*shape)]
    assert torch.autograd.gradcheck(lambda q, k, v: taylor_attention(q, k, v, mask, scale=0.7, backend=backend), inputs)


@pytest.mark.parametrize("tokens", [4096, 65536])
@pytest.mark.parametrize("backend", FAST)
def test_common_offset_costs_no_digits(backend, tokens):
    """K and V carry an offset of 100 times their spread. Also checked without the mean, which would hide the rest."""
    inputs = [t.float() for t in qkv(1, 1, 64, tokens, 16, 16, offset=100.0)]
    query, key, value = (t.double() for t in inputs)
    truth = reference.algorithm1(query, key, value, None, 0.25)
    actual = taylor_attention(*inputs, backend=backend).double()
    assert (actual - truth).norm() <= 1e-5 * truth.norm()
    vbar = value.mean(-2, keepdim=True)
    centred_truth = reference.algorithm1(query, key, value - vbar, None, 0.25)
    out_rounding = torch.finfo(torch.float32).eps * vbar.abs().max() * truth.numel() ** 0.5
    assert (actual - vbar - centred_truth).norm() <= 1e-5 * centred_truth.norm() + out_rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [4096, 65536])
@pytest.mark.parametrize("kernel", [cpu, aten], ids=["cpu", "aten"])
def test_low_precision_is_summed_in_float32(kernel, tokens, dtype):
    """M, kbar and vbar of rounded inputs with an offset of 100 times their spread: what the output is rounded from."""
    query, key, value = (t.to(dtype) for t in qkv(1, 2, 64, tokens, 16, 16, offset=100.0))
    out, state = kernel.forward(query, key, value, None, 0.25)
    assert out.dtype == dtype
    _, truth = reference.affine(*(t.double() for t in (query, key, value)), None, 0.25)
    # M is a sum of n terms of either sign and one size, sqrt(n) times smaller than their sum without signs.
    eps = torch.finfo(torch.float32).eps
    allowed = {"M": 2 * eps * tokens**0.5, "kbar": 2 * eps, "vbar": 2 * eps}
    for name, actual, expected in zip(state._fields, state, truth, strict=True):
        assert actual.dtype == torch.float32
        assert (actual.double() - expected).norm() <= allowed[name] * expected.norm(), name


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 4),
    heads=st.integers(1, 4),
    queries=st.integers(1, 90),
    keys=st.integers(1, 90),
    dim=st.integers(1, 20),
    value_dim=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_padding_equals_slicing_and_key_order_is_free(batch, heads, queries, keys, dim, value_dim, seed):
    query, key, value = qkv(batch, heads, queries, keys, dim, value_dim, seed=seed)
    mask = padding(batch, keys, seed=seed)
    for backend in backends():
        masked = taylor_attention(query, key, value, mask, backend=backend)
        for b in range(batch):
            keep = mask[b, 0, 0]
            sliced = taylor_attention(query[b, None], key[b, None, :, keep], value[b, None, :, keep], backend=backend)
            torch.testing.assert_close(masked[b, None], sliced, rtol=0, atol=1e-11)
        order = torch.randperm(keys)
        shuffled = taylor_attention(query, key[:, :, order], value[:, :, order], mask[..., order], backend=backend)
        torch.testing.assert_close(shuffled, masked, rtol=0, atol=1e-11)


@pytest.mark.parametrize("backend", backends())
def test_padding_may_hold_nan(backend):
    inputs = qkv(2, 2, 9, 12, 4, 4)
    mask = padding(2, 12)
    expected = taylor_attention(*inputs, mask)
    poisoned = [inputs[0], *(t.masked_fill(~mask.mT, torch.nan) for t in inputs[1:])]
    leaves = [t.requires_grad_() for t in poisoned]
    out = taylor_attention(*leaves, mask, backend=backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert all((g.masked_select(~mask.mT) == 0).all() for g in grads[1:])


@pytest.mark.parametrize("backend", backends())
def test_fully_masked_image_gives_zero(backend):
    inputs = [t.requires_grad_() for t in qkv(2, 2, 9, 12, 4, 4)]
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 12)
    out = taylor_attention(*inputs, mask, backend=backend)
    assert (out[1] == 0).all()
    assert (out[0] != 0).all()
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all((g[1] == 0).all() for g in grads)


def test_heads_merge_without_a_copy():
    out = taylor_attention(*qkv(2, 3, 10, 12, 4, 5))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 4, 4), (2, 2, 0, 5, 4, 4)], ids=["no_images", "no_queries"])
def test_empty_batch(shape):
    inputs = [t.requires_grad_() for t in qkv(*shape)]
    out = taylor_attention(*inputs)
    assert out.shape == (shape[0], 2, shape[2], 4)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), inputs))


def test_same_bits_every_time():
    inputs = [t.float() for t in qkv(4, 8, 197, 197, 16, 16)]
    assert torch.equal(taylor_attention(*inputs), taylor_attention(*inputs))


def test_backend_names():
    with pytest.raises(InputError, match=r"unknown backend 'cpus': did you mean 'cpu'.* aten, cpu, reference"):
        taylor_attention(*qkv(1, 1, 4, 4, 4, 4), backend="cpus")


def test_the_cpu_kernel_is_for_the_cpu():
    inputs = [t.to("meta") for t in qkv(1, 1, 4, 4, 4, 4)]
    with pytest.raises(InputError, match="backend 'cpu' takes tensors on the CPU, not on meta"):
        taylor_attention(*inputs, backend="cpu")
    assert taylor_attention(*inputs).device.type == "meta"
