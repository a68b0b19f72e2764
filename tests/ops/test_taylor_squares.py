"""The squares-only second order against its dense definition, and the dense first-order weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from taylor_inputs import packed, padding, qkv

from vitrify.ops import taylor_squares_attention, taylor_weights


def dense(query, key, value, mask, scale):
    """Weights 1 + x + scale^2/2 sum_a q_a^2 k^_a^2 over the valid keys, divided by their row sum, times V."""
    valid = torch.ones(key.shape[0], 1, 1, key.shape[2], dtype=key.dtype) if mask is None else mask.to(key.dtype)
    centred = key - (valid @ key) / valid.sum(-1, keepdim=True)
    weights = 1 + scale * query @ centred.mT + scale**2 / 2 * query.square() @ centred.square().mT
    weights = weights * valid
    return weights / weights.sum(-1, keepdim=True) @ value


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, n) for n in (3, 3, 40, 40, 12, 12)]),
    seed=st.integers(0, 2**16),
    masked=st.booleans(),
)
def test_matches_dense_definition(sizes, seed, masked):
    inputs = qkv(*sizes, seed=seed)
    mask = padding(sizes[0], sizes[3], seed=seed) if masked else None
    expected = dense(*inputs, mask, sizes[4] ** -0.5)
    torch.testing.assert_close(taylor_squares_attention(*inputs, mask), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_gradcheck(masked):
    inputs = [t.requires_grad_() for t in qkv(2, 2, 5, 6, 3, 4)]
    mask = padding(2, 6) if masked else None
    assert torch.autograd.gradcheck(lambda *t: taylor_squares_attention(*t, mask), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_offset(dtype):
    inputs = [t.to(dtype) for t in packed(*qkv(2, 2, 577, 577, 32, 32, offset=100.0))]
    truth = dense(*(t.double() for t in inputs), None, 32**-0.5)
    out = taylor_squares_attention(*inputs)
    assert out.dtype == dtype
    assert (out.double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max() + 1e-3 * 1e-2


def test_fully_masked_image_gives_zero():
    inputs = [t.requires_grad_() for t in qkv(2, 2, 9, 12, 4, 4)]
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 12)
    out = taylor_squares_attention(*inputs, mask)
    assert (out[1] == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), inputs))


def test_second_order_is_closer_to_softmax_along_one_axis():
    """With head_dim 1 the squares are the whole second-order term, so small logits are matched one order better."""
    query, key, value = qkv(1, 2, 20, 20, 1, 4)
    softmax = (0.05 * query @ key.mT).softmax(-1) @ value
    first = (taylor_weights(query, key, scale=0.05) @ value - softmax).abs().max()
    second = (taylor_squares_attention(query, key, value, scale=0.05) - softmax).abs().max()
    assert second < first / 5


def test_weights_sum_to_one_over_valid_keys():
    query, key, _ = qkv(2, 2, 9, 12, 4, 4)
    mask = padding(2, 12)
    weights = taylor_weights(query, key, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (weights.masked_select(~mask) == 0).all()
