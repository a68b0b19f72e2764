"""The two definitions agree: Algorithm 1 step by step, and the affine form with its closed-form backward."""

from __future__ import annotations

import pytest
import torch
from taylor_inputs import padding, qkv

from vitrify.ops.taylor import reference

# (batch, heads, queries, keys, dim, value_dim): self-attention, PVT's fewer keys, LeViT's wider values, one key.
SHAPES = [(2, 3, 17, 17, 8, 8), (1, 2, 40, 9, 8, 8), (2, 2, 7, 23, 4, 12), (2, 1, 5, 1, 3, 2)]


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_affine_equals_algorithm1(shape: tuple[int, ...], masked: bool) -> None:
    query, key, value = qkv(*shape)
    keep = padding(shape[0], shape[3])[:, 0, 0] if masked else None
    scale = shape[4] ** -0.5
    stepwise = reference.algorithm1(query, key, value, keep, scale)
    affine, _ = reference.affine(query, key, value, keep, scale)
    torch.testing.assert_close(affine, stepwise, rtol=0, atol=1e-12)
    dense = reference.weights(query, key, keep, scale) @ value
    torch.testing.assert_close(dense, stepwise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closed_form_backward_equals_autograd(shape: tuple[int, ...], masked: bool) -> None:
    inputs = [t.requires_grad_() for t in qkv(*shape)]
    keep = padding(shape[0], shape[3])[:, 0, 0] if masked else None
    out = reference.algorithm1(*inputs, keep, 0.3)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, inputs, grad)
    with torch.no_grad():
        _, state = reference.affine(*inputs, keep, 0.3)
        actual = reference.affine_backward(grad, *inputs, keep, 0.3, state)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


def test_first_order_of_softmax() -> None:
    """For small logits the weights are softmax's to second order: the error falls with the square of the scale."""
    query, key, _ = qkv(1, 2, 30, 30, 8, 8)

    def error(scale: float) -> float:
        softmax = (scale * query @ key.mT).softmax(-1)
        return float((reference.weights(query, key, None, scale) - softmax).abs().max())

    assert error(1e-3) < 1e-2 * error(1e-2) * 1.2
