"""Bad input: the error names the tensor, the shapes and the axis, and what would be right."""

from __future__ import annotations

import pytest
import torch

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops import (
    sparse_softmax_attention,
    taylor_attention,
    taylor_sparse_attention,
    taylor_squares_attention,
    taylor_weights,
)


def tensors(query=(2, 3, 5, 4), key=(2, 3, 7, 4), value=(2, 3, 7, 6)):
    return torch.zeros(query), torch.zeros(key), torch.zeros(value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"query": (3, 5, 4)}, r"query must have 4 axes \(batch, heads, tokens, head_dim\), not shape \(3, 5, 4\)"),
        ({"key": (1, 3, 7, 4)}, r"key \(1, 3, 7, 4\) and query \(2, 3, 5, 4\) differ in batch \(axis 0\): 1 against 2"),
        ({"value": (2, 1, 7, 6)}, r"value \(2, 1, 7, 6\) and query .* differ in heads \(axis 1\): 1 against 3"),
        ({"key": (2, 3, 7, 5)}, r"key \(2, 3, 7, 5\) and query .* differ in head_dim \(axis 3\): 5 against 4"),
        ({"value": (2, 3, 8, 6)}, r"value \(2, 3, 8, 6\) and key .* differ in tokens \(axis 2\): 8 against 7"),
        ({"key": (2, 3, 0, 4), "value": (2, 3, 0, 6)}, r"at least one key token"),
    ],
    ids=str,
)
def test_shapes(shapes, message):
    with pytest.raises(InputError, match=message):
        taylor_attention(*tensors(**shapes))
    with pytest.raises(InputError, match=message):
        taylor_squares_attention(*tensors(**shapes))


def test_dtypes():
    query, key, value = tensors()
    with pytest.raises(InputError, match="key is float64 but query is float32: all three need one dtype"):
        taylor_attention(query, key.double(), value)
    with pytest.raises(InputError, match="query must be float16, bfloat16, float32 or float64, not int64"):
        taylor_attention(query.long(), key, value)
    with pytest.raises(InputError, match="value must be a Tensor, not NoneType"):
        taylor_attention(query, key, None)
    with pytest.raises(InputError, match="key is on meta but query is on cpu"):
        taylor_attention(query, key.to("meta"), value)


@pytest.mark.parametrize(
    ("scale", "message"),
    [("1", "scale must be a number, not str"), (0.0, "positive and finite, not 0.0"), (float("nan"), "not nan")],
)
def test_scale(scale, message):
    with pytest.raises(InputError, match=message):
        taylor_attention(*tensors(), scale=scale)


MASKS = [
    (torch.zeros(2, 1, 1, 7), UnsupportedError, "attn_mask is float32: .* no additive mask or bias"),
    (torch.ones(2, 7, dtype=torch.bool), UnsupportedError, r"shape \(2, 7\).*write mask\[:, None, None, :\]"),
    (torch.ones(2, 1, 5, 7, dtype=torch.bool), UnsupportedError, r"may vary over queries \(axis 2\)"),
    (torch.ones(2, 3, 1, 7, dtype=torch.bool), UnsupportedError, r"may vary over heads \(axis 1\)"),
    (torch.ones(2, 1, 1, 6, dtype=torch.bool), InputError, r"\(2, 1, 1, 6\) but key has shape \(2, 3, 7, 4\)"),
    (torch.ones(3, 1, 1, 7, dtype=torch.bool), InputError, r"\(3, 1, 1, 7\) but key has shape \(2, 3, 7, 4\)"),
    ("padding", InputError, "attn_mask must be a bool Tensor or None, not str"),
]


@pytest.mark.parametrize(("mask", "error", "message"), MASKS, ids=[message for *_, message in MASKS])
def test_masks(mask, error, message):
    query, key, value = tensors()
    calls = (
        lambda: taylor_attention(query, key, value, mask),
        lambda: taylor_squares_attention(query, key, value, mask),
        lambda: taylor_sparse_attention(query, key, value, mask, threshold=0.1),
        lambda: sparse_softmax_attention(query, key, value, mask, threshold=0.1),
        lambda: taylor_weights(query, key, mask),
    )
    for call in calls:
        with pytest.raises(error, match=message):
            call()


def test_one_mask_for_all_images():
    query, key, value = (torch.randn(t.shape) for t in tensors())
    mask = torch.arange(7)[None, None, None] < 4
    torch.testing.assert_close(
        taylor_attention(query, key, value, mask), taylor_attention(query, key[:, :, :4], value[:, :, :4])
    )
