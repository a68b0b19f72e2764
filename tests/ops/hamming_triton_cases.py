"""The Triton kernels of Hamming attention against the definition: interpreted if TRITON_INTERPRET=1, else on the GPU.

`test_hamming_triton.py` runs this file in a process of its own, because Triton decides at import whether it interprets;
`test_hamming_triton_gpu.py` imports its tests.
"""

from __future__ import annotations

import os

import pytest
import torch
from any_shape import ANY
from hypothesis import given
from hypothesis import strategies as st
from taylor_inputs import moved, padding, scattered
from torch import Tensor

from vitrify.nn.hamming import Hamming
from vitrify.ops import gpu, hamming_attention
from vitrify.ops.hamming import aten, bits, triton
from vitrify.ops.hamming.aten import Code
from vitrify.ops.launch import Plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's tl.dot reads bfloat16 as integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
STORED = ["bits", "int8", "bool", "numbers"]

# (batch, heads, queries, keys, dim, value_dim)
SHAPES = [(1, 1, 1, 1, 16, 16), (2, 1, 63, 63, 24, 40), (1, 2, 5, 197, 20, 72)]
if not INTERPRETED:
    SHAPES += [(2, 3, n, n, 64, 64) for n in (63, 197, 577, 1000, 4096)]
    SHAPES += [(1, 2, 900, 49, 16, 128), (1, 2, 577, 577, 80, 80), (1, 1, 300, 65_536, 128, 128)]


MOST = 90 if INTERPRETED else 700


@pytest.fixture(params=[False, True], ids=["one_launch", "shared_heads"])
def shared(request, monkeypatch):
    """Give every head to one program, or tear all heads into chunks of 64 and 128 tokens, whatever their shape."""
    monkeypatch.setattr(triton, "plan", lambda *_, divide=False: Plan(64, 128) if request.param or divide else None)
    return request.param


def inputs(shape, *, signed=False, dtype=torch.float32, largest=8, seed=0):
    """Return codes as bool (B, H, Nq, D), (B, H, Nk, D) and values (B, H, Nk, Dv) that are small integers."""
    batch, heads, queries, keys, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(0, 2, (batch, heads, n, dim), generator=generator).bool() for n in (queries, keys)]
    value = torch.randint(-largest, largest + 1, (batch, heads, keys, value_dim), generator=generator)
    return *codes, value.to(dtype), Code(dim, signed)


def stored(code: Tensor, how: str, dtype: torch.dtype, signed: bool) -> Tensor:
    numbers = 2 * code.to(torch.int8) - 1 if signed else code.to(torch.int8)
    return {"bits": bits.pack_bits(code), "bool": code, "int8": numbers, "numbers": numbers.to(dtype)}[how]


def run(query, key, value, keep, code, out_dtype=torch.float32):
    """Return the result and C_k^T V, on the CPU."""
    tensors = [None if t is None else moved(t, DEVICE) for t in (query, key, value, keep)]
    return [t.cpu() for t in triton.forward(*tensors, code, out_dtype)]


def check(query, key, value, keep, code, how, out_dtype=torch.float32):
    """Every sum is an integer that float32 holds: the result and C_k^T V are exact, bit for bit."""
    signed = code.signed and how != "bool"
    coded = [stored(t, how, value.dtype, signed) for t in (query, key)]
    if keep is not None and how == "numbers":
        coded[1] = coded[1].masked_fill(~keep[:, None, :, None], torch.nan)
    actual, matrices = run(*coded, value, keep, code, out_dtype)
    truth_code = [stored(t, "numbers", torch.float64, signed) for t in (query, key)]
    truth, true_matrices = aten.forward(*truth_code, value.double(), keep, code, torch.float64)
    assert truth.abs().max() < 2**24
    assert (actual.dtype, matrices.dtype) == (out_dtype, torch.float32)
    assert torch.equal(matrices.double(), true_matrices)
    assert torch.equal(actual, truth.to(out_dtype))


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("signed", [False, True], ids=["binary", "sign"])
@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_exact(shape, how, signed):
    for dtype in DTYPES:
        query, key, value, code = inputs(shape, signed=signed, dtype=dtype)
        check(query, key, value, None, code, how)


@pytest.mark.usefixtures("nan_poison", "shared")
@ANY
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), *[st.integers(1, MOST)] * 2, *[st.integers(16, 128)] * 2),
    how=st.sampled_from(STORED),
    signed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, how, signed, dtype, padded, seed):
    query, key, value, code = inputs(shape, signed=signed, dtype=dtype, seed=seed)
    keep = padding(shape[0], shape[3], seed=seed)[:, 0, 0] if padded else None
    check(query, key, scattered(value, seed), keep, code, how)


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("signed", [False, True], ids=["binary", "sign"])
def test_padding(how, signed):
    """Holes, an image whose first tile is all padding, one without any valid key; NaN in every padded value."""
    query, key, value, code = inputs((3, 1, 9, 130, 24, 20), signed=signed)
    keep = padding(3, 130)[:, 0, 0]
    keep[1, :70] = False
    keep[2] = False
    value = value.masked_fill(~keep[:, None, :, None], torch.nan)
    check(query, key, value, keep, code, how)


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("how", STORED)
def test_any_strides(how):
    query, key, value, code = inputs((2, 2, 66, 66, 24, 16), signed=True)
    signed = how != "bool"
    coded = [stored(t, how, value.dtype, signed) for t in (query, key)]
    near = run(*coded, value, None, code)
    filled = {"bits": 255, "bool": True, "int8": 77, "numbers": torch.nan}[how]
    far = run(*(scattered(t, seed, filled) for seed, t in enumerate(coded)), scattered(value, 7), None, code)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


@pytest.mark.usefixtures("shared")
def test_offsets_beyond_32_bits():
    """Three tokens of bits that lie 2^30 bytes apart, in memory of which nothing else is touched."""
    query, _, value, code = inputs((1, 2, 3, 3, 16, 16))
    packed = bits.pack_bits(query)
    storage = torch.empty(2**31 + 4, dtype=torch.uint8, device=DEVICE)
    spread = storage.as_strided((1, 2, 3, 2), (0, 2, 2**30, 1))
    spread.copy_(packed)
    far = triton.forward(spread, spread, value.to(DEVICE), None, code, torch.float32)[0].cpu()
    assert torch.equal(far, run(packed, packed, value, None, code)[0])


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_once(dtype):
    """Real numbers: the error is that of float32 sums, and one rounding of the result."""
    query, key, _, code = inputs((1, 2, 40, 300, 24, 40), signed=True)
    value = torch.randn(1, 2, 300, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    coded = [bits.pack_bits(t) for t in (query, key)]
    actual, _ = run(*coded, value, None, code, dtype)
    truth, _ = aten.forward(*coded, value.double(), None, code, torch.float64)
    plain, _ = aten.forward(*coded, value.float(), None, code, torch.float32)
    # Tensor cores cut off their sums: 2^-22 of the largest at each step of 16 tokens.
    cut = 0.0 if INTERPRETED else 2**-22 * 300 / 16
    plain_error = (plain - truth).abs().max()
    allowed = 2 * plain_error + (torch.finfo(dtype).eps / 2 + 2**-22 + cut) * truth.abs().max()
    assert (actual.double() - truth).abs().max() <= allowed


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("how", STORED)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_gradients_of_integers_are_exact(how, padded):
    query, key, value, code = inputs((2, 2, 70, 90, 24, 20), signed=how != "bool", dtype=torch.float16, largest=2)
    keep = padding(2, 90)[:, 0, 0] if padded else None
    coded = [stored(t, how, value.dtype, code.signed) for t in (query, key)]
    grad = torch.randint(-2, 3, (2, 2, 70, 20), generator=torch.Generator().manual_seed(3)).half()
    tensors = [None if t is None else moved(t, DEVICE) for t in (grad, *coded, value, keep)]
    _, matrices = triton.forward(*tensors[1:], code, torch.float16)
    actual = [t.cpu() for t in triton.backward(*tensors, matrices, code)]
    wide = [t.double() if t.is_floating_point() else t for t in (*coded, value)]
    _, true_matrices = aten.forward(*wide, keep, code, torch.float64)
    truth = aten.backward(grad.double(), *wide, keep, true_matrices, code)
    for found, expected in zip(actual, truth, strict=True):
        assert torch.equal(found, expected.to(found.dtype))
        assert found.dim() == 1 or found.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("layout", ["packed", "scattered"])
@pytest.mark.parametrize("limits", ["learned", "token_mean", "zero"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 3, 70, 24), (1, 2, 130, 61)], ids=str)
def test_threshold_bits(shape, limits, layout):
    """Ties included, which give no bit; NaN gives none either."""
    batch, heads, tokens, dim = shape
    x = torch.randint(-3, 4, (batch, tokens, 3, heads, dim), generator=torch.Generator().manual_seed(0)) / 2
    x[0, 0, 0, 0, 0] = torch.nan
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        view = x.to(dtype)[:, :, 1].transpose(1, 2)
        view = scattered(view, 5) if layout == "scattered" else view
        threshold = {
            "learned": torch.randint(-1, 2, (heads, 1, dim)) / 2,
            "token_mean": view.mean(-1, keepdim=True),
            "zero": view.new_zeros(()),
        }[limits]
        packed = triton.threshold_bits(moved(view, DEVICE), moved(threshold, DEVICE)).cpu()
        assert packed.is_contiguous()
        assert torch.equal(packed, bits.threshold_bits(view, threshold))


@pytest.mark.usefixtures("shared")
def test_same_bits_every_time():
    query, key, _, code = inputs((2, 2, 70, 300, 24, 16))
    value = torch.randn(2, 2, 300, 16)
    first, second = (run(query, key, value, None, code) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.usefixtures("nan_poison")
@pytest.mark.parametrize("case", ["float64", "wide", "no_images", "no_queries"])
def test_what_the_kernels_leave_to_plain_pytorch(case):
    shape = {"wide": (1, 1, 5, 7, 129, 16), "no_images": (0, 1, 5, 7, 8, 8), "no_queries": (1, 1, 0, 7, 8, 8)}
    dtype = torch.float64 if case == "float64" else torch.float32
    query, key, value, code = inputs(shape.get(case, (1, 1, 5, 7, 8, 8)), dtype=dtype)
    actual, expected = (run(query, key, value, None, code), aten.forward(query, key, value, None, code, torch.float32))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    x = torch.randn(1, 1, 5, shape.get(case, (8,) * 5)[4], dtype=dtype, device=DEVICE)
    assert torch.equal(triton.threshold_bits(x, x.new_zeros(())), bits.threshold_bits(x, x.new_zeros(())))


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_backend_triton_with_gradients(out_dtype):
    query, key, value, _ = inputs((1, 2, 9, 12, 16, 16), largest=3)
    leaves = [t.float().to(DEVICE).requires_grad_() for t in (query, key, value)]
    mask = padding(1, 12).to(DEVICE)
    results = []
    for backend in ("triton", "aten"):
        out = hamming_attention(*leaves, mask, backend=backend, out_dtype=out_dtype)
        results.append([out, *torch.autograd.grad((out * out.detach().sign()).sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("form", ["published", "taylor"])
@pytest.mark.parametrize("codes", ["binary", "sign"])
@pytest.mark.parametrize("binariser", ["learned", "token_mean", "ksh"])
def test_the_core_moves_bits_in_inference(form, codes, binariser, monkeypatch):
    monkeypatch.setattr(gpu, "available", lambda device: True)  # on a CPU the op then interprets the kernels
    core = Hamming(2, 24, codes=codes, binariser=binariser, form=form)
    query, key, value = (torch.randn(1, 2, 40, 24, generator=torch.Generator().manual_seed(i)) for i in range(3))
    core.calibrate_(query, key, scale=0.2)
    mask = padding(1, 40).to(DEVICE)
    core, tensors = core.to(DEVICE), [t.to(DEVICE) for t in (query, key, value)]
    plain = core(*tensors, mask, scale=0.2)
    with torch.no_grad(), torch.profiler.profile() as profile:
        by_bits = core(*tensors, mask, scale=0.2)
    assert "vitrify::threshold_bits" in {event.name for event in profile.events()}
    torch.testing.assert_close(by_bits, plain, rtol=1e-5, atol=1e-6)
    # Codes that carry gradients come through as numbers, to the kernels' backward.
    leaves = [t.clone().requires_grad_() for t in tensors]
    found = torch.autograd.grad(core(*leaves, mask, scale=0.2).square().sum(), leaves, allow_unused=True)
    monkeypatch.setattr(gpu, "available", lambda device: False)
    expected = torch.autograd.grad(core(*leaves, mask, scale=0.2).square().sum(), leaves, allow_unused=True)
    for a, e in zip(found, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
