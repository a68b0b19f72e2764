"""The sparse training part: exact at both ends, predicted per image and head, without gradient through the mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from taylor_inputs import packed, padding, qkv

from vitrify.errors import InputError
from vitrify.ops import (
    sparse_mask,
    sparse_softmax_attention,
    taylor_attention,
    taylor_sparse_attention,
    taylor_weights,
)

SIZES = {
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "queries": st.integers(1, 40),
    "keys": st.integers(1, 40),
    "dim": st.integers(1, 12),
    "value_dim": st.integers(1, 12),
    "seed": st.integers(0, 2**16),
    "masked": st.booleans(),
}


def case(batch, heads, queries, keys, dim, value_dim, seed, masked):
    return qkv(batch, heads, queries, keys, dim, value_dim, seed=seed), padding(
        batch, keys, seed=seed
    ) if masked else None


def naive_mask(query, key, keep, scale, threshold, bits):
    """docs/papers.md 3, one image and head at a time, on its valid keys only."""
    mask = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
    top = 2 ** (bits - 1) - 1
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            valid = torch.ones(key.shape[2], dtype=torch.bool) if keep is None else keep[b, 0, 0]
            q, k = query[b, h], key[b, h, valid]
            k = k - k.mean(0)
            q_step, k_step = q.abs().max() / top, k.abs().max() / top
            q_hat = (q / q_step).round() * q_step if q_step > 0 else q
            k_hat = (k / k_step).round() * k_step if k_step > 0 else k
            mask[b, h, :, valid] = (scale * q_hat @ k_hat.T).softmax(-1) >= threshold
    return mask


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**SIZES)
def test_both_ends_are_exact(**sizes):
    (query, key, value), mask = case(**sizes)
    out, density = taylor_sparse_attention(query, key, value, mask, threshold=0.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, mask), rtol=0, atol=1e-12)
    assert density == 1
    out, density = taylor_sparse_attention(query, key, value, mask, threshold=1.5)
    assert torch.equal(out, taylor_attention(query, key, value, mask))
    assert density == 0
    out, density = sparse_softmax_attention(query, key, value, mask, threshold=0.0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, mask), rtol=0, atol=1e-12)
    assert density == 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**SIZES, bits=st.integers(2, 8), relative=st.floats(0.3, 3))
def test_mask_and_output_follow_the_definition(bits, relative, **sizes):
    (query, key, value), mask = case(**sizes)
    scale, threshold = sizes["dim"] ** -0.5, relative / sizes["keys"]
    kept = sparse_mask(query, key, mask, threshold=threshold, bits=bits)
    assert torch.equal(kept, naive_mask(query, key, mask, scale, threshold, bits))
    scores = scale * query @ key.mT
    valid = torch.ones_like(kept) if mask is None else mask.expand_as(kept)
    probabilities = scores.masked_fill(~valid, -torch.inf).softmax(-1)
    weights = taylor_weights(query, key, mask)
    expected = (weights + kept * (probabilities - weights)) @ value
    out, density = taylor_sparse_attention(query, key, value, mask, threshold=threshold, bits=bits)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(density, kept.sum() / valid.sum())
    out, density = sparse_softmax_attention(query, key, value, mask, threshold=threshold, bits=bits)
    kept_only = torch.nan_to_num(scores.masked_fill(~kept, -torch.inf).softmax(-1))
    torch.testing.assert_close(out, kept_only @ value, rtol=0, atol=1e-11)
    torch.testing.assert_close(density, kept.sum() / valid.sum())


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("function", [taylor_sparse_attention, sparse_softmax_attention])
def test_gradients_with_the_mask_held(function, masked):
    """gradcheck moves the inputs by 1e-6, which does not change the mask, so the derivative is that of a fixed mask."""
    inputs = [t.requires_grad_() for t in qkv(2, 2, 6, 5, 3, 4)]
    mask = padding(2, 5) if masked else None
    _, density = function(*inputs, mask, threshold=0.2)
    assert 0 < density < 1
    assert not density.requires_grad
    assert torch.autograd.gradcheck(lambda *t: function(*t, mask, threshold=0.2)[0], inputs)


def test_one_image_does_not_change_its_neighbour():
    query, key, _ = qkv(2, 2, 20, 20, 8, 8)
    alone = sparse_mask(query[:1], key[:1], threshold=0.05)
    key[1] *= 100
    query[1] *= 100
    assert torch.equal(sparse_mask(query, key, threshold=0.05)[:1], alone)


def test_common_offset_of_keys_changes_nothing():
    query, key, _ = qkv(2, 2, 20, 20, 8, 8)
    assert torch.equal(sparse_mask(query, key + 1000, threshold=0.05), sparse_mask(query, key, threshold=0.05))


@pytest.mark.parametrize("masked", [False, True])
def test_threshold_0_is_softmax_in_float32_beside_large_offsets(masked):
    """Offsets of 100 in K and V: as exact as PyTorch's own softmax attention is, in the same dtype."""
    q, k, v = qkv(2, 3, 50, 196, 32, 32, offset=100.0)
    keep = padding(2, 196) if masked else None
    truth = F.scaled_dot_product_attention(q, k, v, keep)
    narrow = [t.float() for t in (q, k, v)]
    out, _ = taylor_sparse_attention(*narrow, keep, threshold=0.0)
    plain = F.scaled_dot_product_attention(*narrow, keep)
    assert (out - truth).abs().max() <= 3 * (plain - truth).abs().max()


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [63, 197])
def test_low_precision(dtype, tokens):
    """float32 inside: given its mask, the result errs by its own rounding and a few float32 roundings."""
    query, key, value = (t.to(dtype) for t in packed(*qkv(2, 2, tokens, tokens, 32, 32)))
    kept = sparse_mask(query, key, threshold=1 / tokens)
    out, density = taylor_sparse_attention(query, key, value, threshold=1 / tokens)
    assert (out.dtype, density.dtype) == (dtype, torch.float32)
    query, key, value = query.double(), key.double(), value.double()
    weights, probabilities = taylor_weights(query, key), (32**-0.5 * query @ key.mT).softmax(-1)
    truth = (weights + kept * (probabilities - weights)) @ value
    allowed = torch.finfo(dtype).eps / 2 * truth.abs().max() + 16 * torch.finfo(torch.float32).eps
    assert (out.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("function", [taylor_sparse_attention, sparse_softmax_attention])
def test_fully_masked_image_gives_zero_and_no_nan(function):
    inputs = [t.requires_grad_() for t in qkv(2, 2, 9, 12, 4, 4)]
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 12)
    out, density = function(*inputs, mask, threshold=0.05)
    assert (out[1] == 0).all()
    assert density.isfinite()
    assert all(g.isfinite().all() and (g[1] == 0).all() for g in torch.autograd.grad(out.square().sum(), inputs))


def test_rows_without_kept_entries_are_zero():
    query, key, value = qkv(1, 1, 8, 16, 4, 4)
    query[..., :4, :] = 0  # uniform attention, 1/16 each: below the threshold
    query[..., 4:, :] *= 100
    out, _ = sparse_softmax_attention(query, key, value, threshold=0.5)
    assert (out[..., :4, :] == 0).all()
    assert (out[..., 4:, :] != 0).all()


def test_zero_queries_are_uniform():
    """All-zero inputs have quantiser step 0: probabilities are 1/n, not NaN."""
    query, key, _ = qkv(1, 1, 4, 8, 4, 4)
    assert sparse_mask(query * 0, key * 0, threshold=1 / 8).all()
    assert not sparse_mask(query * 0, key * 0, threshold=1 / 7).any()


def test_threshold_may_be_a_tensor():
    inputs = qkv(1, 2, 12, 12, 4, 4)
    by_number = taylor_sparse_attention(*inputs, threshold=0.125)
    by_tensor = taylor_sparse_attention(*inputs, threshold=torch.tensor(0.125))
    assert torch.equal(by_number[0], by_tensor[0])
    assert torch.equal(by_number[1], by_tensor[1])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"threshold": -0.1}, "threshold must be a probability, 0 or more .* not -0.1"),
        ({"threshold": float("nan")}, "threshold must be a probability.* not nan"),
        ({"threshold": "0.5"}, "threshold must be a probability.* not '0.5'"),
        ({"threshold": torch.ones(2)}, r"0-dim float tensor, not float32 of shape \(2,\)"),
        ({"threshold": 0.5, "bits": 1}, "bits must be an integer from 2 to 16, not 1"),
        ({"threshold": 0.5, "bits": 4.0}, "bits must be an integer from 2 to 16, not 4.0"),
    ],
    ids=str,
)
def test_bad_predictor_arguments(bad, message):
    query, key, value = qkv(1, 1, 4, 4, 4, 4)
    with pytest.raises(InputError, match=message):
        taylor_sparse_attention(query, key, value, **bad)
    with pytest.raises(InputError, match=message):
        sparse_softmax_attention(query, key, value, **bad)
    with pytest.raises(InputError, match=message):
        sparse_mask(query, key, **bad)
