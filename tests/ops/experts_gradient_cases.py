"""The Triton kernel of mixtures' weight gradients against float64: interpreted if TRITON_INTERPRET=1, else on the GPU.

`test_experts_gradient.py` runs this file in a process of its own, because Triton decides at import whether it
interprets; `test_experts_gradient_gpu.py` imports its tests.
"""

from __future__ import annotations

import os

import pytest
import torch
from any_shape import ANY
from experts_inputs import PATTERNS, pattern
from hypothesis import given
from hypothesis import strategies as st

from vitrify.ops.experts import aten, groups_of, triton_gradient

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's tl.dot reads bfloat16 as integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
WAYS = pytest.mark.parametrize(("gather", "scatter"), [(True, True), (True, False), (False, True)])

# (tokens, width, columns): aligned and not, tiles of 64 and of 128, less than a tile and several
SHAPES = [(1, 16, 16), (63, 40, 24), (197, 33, 70), (300, 64, 144), (577, 192, 80)]
if not INTERPRETED:
    SHAPES += [(n, 768, 3072) for n in (1, 197, 12_608)] + [(50_432, 192, 768), (12_608, 768, 192)]


@pytest.fixture(params=[1, 3], ids=["alone", "shared"])
def parts(request, monkeypatch):
    """Let an expert's tokens be shared between so many programs, more than there are tokens if need be."""
    monkeypatch.setattr(triton_gradient, "shares", lambda *_: request.param)
    return request.param


def tensors(tokens, width, columns, dtype):
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, size, generator=generator).to(dtype) for size in (columns, width))


def run(grad, x, index, gather=True, scatter=True, trained=2):
    """Return the gradients of the weights and the biases, on the CPU."""
    order, counts = groups_of(index.to(DEVICE))
    found = triton_gradient.gradient(grad.to(DEVICE), x.to(DEVICE), order, counts, gather, scatter, trained)
    return tuple(t.cpu() for t in found)


def check(found, grad, x, index, gather=True, scatter=True):
    """Compare with float64: one rounding of the result, and what float32 sums of so many terms may lose.

    One after the other they lose 2^-24 of the sum of the terms' sizes each; tensor cores, which add 8 products and more
    at a time and cut off what float32 does not hold, less than half of that.
    """
    groups, trained = groups_of(index), found[0].shape[0]
    truth = aten.gradient(grad.double(), x.double(), *groups, gather, scatter, trained)
    sizes = aten.gradient(grad.double().abs(), x.double().abs(), *groups, gather, scatter, trained)
    info = torch.finfo(x.dtype)
    for result, exact, size in zip(found, truth, sizes, strict=True):
        assert result.dtype == x.dtype
        allowed = info.eps * exact.abs() + 2**-24 * (len(x) + 32) * size + info.smallest_normal * info.eps
        excess = ((result.double() - exact).abs() - allowed).max()
        assert excess <= 0, f"beyond what is allowed by {excess:.3e}"


@pytest.mark.usefixtures("nan_poison", "parts")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_over_each_experts_tokens(shape, dtype):
    tokens, width, columns = shape
    grad, x = tensors(tokens, width, columns, dtype)
    for name in PATTERNS:
        index = pattern(name, tokens)
        found = run(grad, x, index)
        check(found, grad, x, index)
        for expert in (0, 1):
            if not (index == expert).any():
                assert all(t[expert].count_nonzero() == 0 for t in found)


@pytest.mark.usefixtures("nan_poison", "parts")
@WAYS
@pytest.mark.parametrize("trained", [1, 2])
def test_gathered_and_scattered(gather, scatter, trained):
    index = pattern("random", 150)
    for width, columns in ((48, 80), (45, 70)):
        grad, x = tensors(150, width, columns, DTYPES[-1])
        found = run(grad, x, index, gather, scatter, trained)
        assert found[0].shape == (trained, columns, width)
        assert found[1].shape == (2, columns)
        check(found, grad, x, index, gather, scatter)


@pytest.mark.usefixtures("nan_poison")
@ANY
@given(st.data())
def test_any_shape(data):
    index = torch.tensor(data.draw(st.lists(st.integers(0, 1), max_size=40)) * data.draw(st.integers(1, 8)))
    index = index.long()
    width, columns = (data.draw(st.integers(1, 150)) for _ in range(2))
    grad, x = tensors(len(index), width, columns, data.draw(st.sampled_from(DTYPES)))
    gather, scatter = data.draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    check(run(grad, x, index, gather, scatter), grad, x, index, gather, scatter)


@pytest.mark.usefixtures("nan_poison")
def test_any_strides():
    """Rows far from each other, entries with neighbours that are no neighbours, and one row for all."""
    index = pattern("random", 70)
    grad, x = tensors(70, 32, 48, DTYPES[-1])
    expected = run(grad, x, index)
    far = x.new_full((70, 50), torch.nan)[:, 3:35].copy_(x)
    apart = grad.new_full((70, 48, 2), torch.nan)[..., 1].copy_(grad)
    assert all(torch.equal(a, b) for a, b in zip(run(apart, far, index), expected, strict=True))
    check(run(grad[:1].expand(70, 48), x, index), grad[:1].expand(70, 48), x, index)


def test_offsets_beyond_32_bits():
    """Three tokens that lie 2^30 numbers apart, in memory of which nothing else is touched."""
    index = torch.tensor([1, 0, 1])
    grad, x = tensors(3, 16, 16, torch.float16)
    far = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE).as_strided((3, 16), (2**30, 1))
    expected = run(grad, x, index)
    assert all(torch.equal(a, b) for a, b in zip(run(grad, far.copy_(x), index), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(far.copy_(grad), x, index), expected, strict=True))


@pytest.mark.usefixtures("nan_poison", "parts")
def test_an_infinite_token_stays_with_its_expert():
    """Infinite, too: the tokens beyond a group's end that fill its last tile must not be multiplied by its zeros."""
    index = pattern("alternating", 30)
    grad, x = tensors(30, 16, 16, DTYPES[-1])
    x[28], grad[28] = torch.inf, 1.0
    weights, biases = run(grad, x, index)
    assert (weights[0] == torch.inf).all()
    assert weights[1].isfinite().all()
    assert biases.isfinite().all()


@pytest.mark.usefixtures("parts")
def test_same_bits_every_time():
    index = pattern("random", 300)
    grad, x = tensors(300, 48, 80, DTYPES[-1])
    first, second = (run(grad, x, index) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("nan_poison", "parts")
def test_no_tokens():
    grad, x = tensors(0, 8, 6, torch.float16)
    weights, biases = run(grad, x, torch.zeros(0, dtype=torch.int64))
    assert weights.count_nonzero() == biases.count_nonzero() == 0
