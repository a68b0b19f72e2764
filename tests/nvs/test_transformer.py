"""View and ray transformers against their formulas; what no view sees has no say."""

import pytest
import torch

from vitrify.errors import InputError
from vitrify.nvs.transformer import Encoding, Mlp, RayAttention, RayTransformer, ViewAttention


def inputs(rays=3, points=5, views=4, width=16):
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    x, seen = torch.randn(rays, points, width, **double), torch.randn(rays, points, views, width, **double)
    return x, seen, torch.randn(rays, points, views, 4, **double), torch.rand(rays, points, views) > 0.4


def test_view_attention_is_its_formula_point_by_point():
    x, seen, angles, valid = inputs()
    valid[0, 0] = True
    attention = ViewAttention(16, 4).double()
    actual = attention(x, seen, angles, valid)
    for ray, point in ((0, 0), (2, 3), (1, 4)):
        keys = [attention.key(v) for v in seen[ray, point]]
        places = [attention.position(a) for a in angles[ray, point]]
        scores = [attention.score(k - attention.query(x[ray, point]) + p) for k, p in zip(keys, places, strict=True)]
        kept = [i for i in range(4) if valid[ray, point, i]] or range(4)
        powers = torch.stack([scores[i].exp() for i in kept])
        values = torch.stack([attention.value(keys[i]) + places[i] for i in kept])
        expected = attention.out((powers / powers.sum(0) * values).sum(0))
        torch.testing.assert_close(actual[ray, point], expected)


def test_what_a_view_does_not_see_changes_nothing():
    x, seen, angles, valid = inputs()
    valid[..., 0] = True
    attention = ViewAttention(16, 4).double()
    changed = torch.where(valid[..., None], seen, 100 * torch.randn_like(seen))
    torch.testing.assert_close(attention(x, seen, angles, valid), attention(x, changed, angles, valid))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_point_that_no_view_sees_is_finite_with_gradients(dtype):
    x, seen, angles, valid = inputs()
    attention = ViewAttention(16, 4).to(dtype)
    x, seen = x.to(dtype).requires_grad_(), seen.to(dtype).requires_grad_()
    out = attention(x, 30 * seen, angles.to(dtype), torch.zeros_like(valid))
    out.float().square().sum().backward()
    assert all(t.isfinite().all() for t in (out, x.grad, seen.grad, *(p.grad for p in attention.parameters())))


@pytest.mark.parametrize("fused", [True, False])
def test_ray_attention_is_softmax_attention(fused):
    x, *_ = inputs()
    attention = RayAttention(16, 4).double()
    attention.fused_attn = fused
    q, k, v = (layer(x).view(3, 5, 4, 4).transpose(1, 2) for layer in (attention.query, attention.key, attention.value))
    weights = (q @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(attention(x), attention.out((weights @ v).transpose(1, 2).reshape(3, 5, 16)))
    torch.testing.assert_close(attention.weights(x), weights.mean((1, 2)))


def test_place_enters_where_a_block_has_it():
    x, *_ = inputs()
    with_place, without = (RayTransformer(16, 4, encoded).double() for encoded in (6, 0))
    first, second = (torch.randn(3, 5, 6, dtype=torch.float64) for _ in range(2))
    assert not torch.allclose(with_place(x, first), with_place(x, second))
    assert torch.equal(without(x, first), without(x, second))


def test_encoding_is_sines_and_cosines_in_octaves():
    x = torch.tensor([[0.3, -2.0]])
    expected = [x, x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()]
    torch.testing.assert_close(Encoding(2)(x), torch.cat(expected, -1))


def test_dropout_only_in_training():
    torch.manual_seed(0)
    mlp, x = Mlp(8, 8, 8, dropout=0.5), torch.randn(4, 8)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


def test_heads_must_divide_the_width():
    with pytest.raises(InputError, match="width 18 must be a multiple of num_heads 4"):
        RayAttention(18, 4)
