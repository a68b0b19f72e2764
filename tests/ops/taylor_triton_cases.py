"""The Triton kernels of Taylor attention against float64: in the interpreter if TRITON_INTERPRET=1, else on the GPU.

`test_taylor_triton.py` runs this file in a process of its own, because Triton decides at import whether it interprets;
`test_taylor_triton_gpu.py` imports its tests.
"""

from __future__ import annotations

import os

import pytest
import torch
from any_shape import ANY
from hypothesis import given
from hypothesis import strategies as st
from taylor_inputs import moved, packed, padding, qkv, scattered

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops import backends, taylor_attention
from vitrify.ops.launch import MAX_CHUNK, Plan
from vitrify.ops.taylor import aten, reference, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's tl.dot reads bfloat16 as integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)

# (batch, heads, queries, keys, dim, value_dim)
SHAPES = [(1, 1, 1, 1, 16, 16), (2, 1, 70, 70, 16, 16), (1, 2, 5, 130, 20, 40), (1, 1, 9, 40, 80, 70)]
if not INTERPRETED:
    SHAPES += [(2, 3, n, n, 64, 64) for n in (63, 197, 577, 1000, 4096)]
    SHAPES += [(1, 2, 900, 49, 32, 32), (1, 2, 197, 197, 80, 128), (1, 1, 300, 65_536, 128, 128)]


MOST = 90 if INTERPRETED else 700


@pytest.fixture(params=[False, True], ids=["one_launch", "shared_heads"])
def shared(request, monkeypatch):
    """Give every head to one program, or tear all heads into chunks of 64 and 128 tokens, whatever their shape."""
    chunks = Plan(64, 128) if INTERPRETED else Plan(128, 256)
    monkeypatch.setattr(triton, "plan", lambda *sizes, divide=False: chunks if request.param else None)
    return request.param


def run(inputs, keep=None, scale=0.3, grad=None):
    """Return the results by name, on the CPU: out, M, kbar, vbar, and the gradients if there is `grad`."""
    query, key, value = (moved(t, DEVICE) for t in inputs)
    keep = None if keep is None else moved(keep, DEVICE)
    out, state = triton.forward(query, key, value, keep, scale)
    results = {"out": out, **state._asdict()}
    if grad is not None:
        grads = triton.backward(grad.to(DEVICE), query, key, value, keep, scale, state)
        results |= dict(zip(("d_query", "d_key", "d_value"), grads, strict=True))
    return {name: t.cpu() for name, t in results.items()}


def expected(inputs, keep=None, scale=0.3, grad=None):
    """Return what `run` does, twice: in float64, the truth, and in plain PyTorch in float32."""
    both = []
    for kernel, dtype in ((reference.affine, torch.float64), (aten.forward, torch.float32)):
        query, key, value = (t.to(dtype) for t in inputs)
        out, state = kernel(query, key, value, keep, scale)
        results = {"out": out, **state._asdict()}
        if grad is not None:
            gradients = reference.affine_backward if dtype == torch.float64 else aten.backward
            grads = gradients(grad.to(dtype), query, key, value, keep, scale, state)
            results |= dict(zip(("d_query", "d_key", "d_value"), grads, strict=True))
        both.append(results)
    return both


def check(inputs, keep=None, scale=0.3, *, forward_only=False, factor=2):
    """Compare everything that both passes compute with float64.

    The bound is twice the error of plain float32 (more for few results: it is the largest of them), plus one rounding
    of the result. On a GPU, float32 products are made
    of three of TF32, and tensor cores cut their sums off instead of rounding them: 2^-22 of the largest sum at each of
    a program's steps of 8 tokens. Programs that share a head take MAX_CHUNK tokens at most.
    """
    dtype, tokens = inputs[0].dtype, max(inputs[0].shape[2], inputs[1].shape[2])
    together = tokens if triton.plan(*inputs[0].shape[1:3], inputs[1].shape[2], 1) is None else min(tokens, MAX_CHUNK)
    grad = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], generator=torch.Generator().manual_seed(1)).to(dtype)
    grad = None if forward_only else grad
    cut = 0.0 if INTERPRETED else 2**-22 * together / 8
    truth, plain = expected(inputs, keep, scale, grad)
    for name, actual in run(inputs, keep, scale, grad).items():
        assert actual.dtype == (torch.float32 if name in reference.AffineState._fields else dtype), name
        error, plain_error = ((t.double() - truth[name]).abs().max() for t in (actual, plain[name]))
        allowed = factor * plain_error + (torch.finfo(actual.dtype).eps + cut) * truth[name].abs().max()
        assert error <= allowed, f"{name}: error {error:.3e} exceeds {allowed:.3e}"


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype):
    check([t.to(dtype) for t in qkv(*shape)])


@pytest.mark.usefixtures("nan_poison", "shared")
@ANY
@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    tokens=st.tuples(st.integers(1, MOST), st.integers(1, MOST)),
    widths=st.tuples(st.integers(16, 128), st.integers(16, 128)),
    dtype=st.sampled_from(DTYPES),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(heads, tokens, widths, dtype, padded, seed):
    inputs = [scattered(t.to(dtype), seed + i) for i, t in enumerate(qkv(*heads, *tokens, *widths, seed=seed))]
    check(inputs, padding(heads[0], tokens[1], seed=seed)[:, 0, 0] if padded else None, factor=4)


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding(dtype):
    """Holes, an image whose first tile is all padding, one without any valid key; NaN in every padded token."""
    query, key, value = (t.to(dtype) for t in qkv(3, 1, 9, 130, 16, 20))
    keep = padding(3, 130)[:, 0, 0]
    keep[1, :70] = False
    keep[2] = False
    key, value = (t.masked_fill(~keep[:, None, :, None], torch.nan) for t in (key, value))
    check([query, key, value], keep)


@pytest.mark.usefixtures("nan_poison", "shared")
@pytest.mark.parametrize("layout", ["packed", "expanded", "scattered"])
def test_any_strides(layout):
    inputs = qkv(2, 2, 66, 66, 16, 16)
    inputs = [t.float() for t in inputs]
    if layout == "packed":
        inputs = packed(*inputs)
    elif layout == "expanded":
        inputs = [t[:1, :1].expand_as(t) for t in inputs]
    else:
        inputs = [scattered(t, seed) for seed, t in enumerate(inputs)]
    keep = padding(1, 66)[:, 0, 0].expand(2, 66)
    check(inputs, keep)


@pytest.mark.usefixtures("shared")
def test_offsets_beyond_32_bits():
    """Three tokens that lie 2^30 numbers apart, in memory of which nothing else is touched."""
    storage = torch.empty(2**31 + 2 * 16, dtype=torch.float16, device=DEVICE)
    spread = storage.as_strided((1, 2, 3, 16), (0, 16, 2**30, 1))
    inputs = [t.half() for t in qkv(1, 2, 3, 3, 16, 16)]
    spread.copy_(inputs[0])
    far = triton.forward(spread, spread, spread, None, 0.3)[0].cpu()
    near = run([inputs[0]] * 3)["out"]
    assert torch.equal(far, near)


@pytest.mark.usefixtures("nan_poison", "shared")
def test_writes_nothing_beside_its_results(monkeypatch):
    """Results are cut out of larger memory: what lies around them stays NaN, and they hold none."""
    memory = []

    def island(like, tokens, dim):
        storage = like.new_full((like.shape[0] + 2, tokens + 2, like.shape[1], dim + 2), torch.nan)
        memory.append(storage)
        return storage[1:-1, 1:-1, :, 1:-1].transpose(1, 2)

    monkeypatch.setattr(triton, "tokens_first", island)
    inputs = [t.float() for t in qkv(1, 2, 65, 67, 20, 24)]
    results = run(inputs, padding(1, 67)[:, 0, 0], grad=torch.randn(1, 2, 65, 24))
    assert len(memory) == 4
    for storage, name in zip(memory, ("out", "d_query", "d_key", "d_value"), strict=True):
        assert results[name].isfinite().all()
        assert storage.isfinite().sum() == results[name].numel()


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [5.0, 100.0])
def test_a_common_offset(offset, dtype):
    """Of 100 times the spread, it costs M no digits; of 5 times, some 16-bit differences round, less than a result."""
    inputs = [t.to(dtype) for t in qkv(1, 1, 16, 200, 16, 16, offset=offset)]
    grad = torch.randn(1, 1, 16, 16).to(dtype)
    actual, (truth, _) = run(inputs, grad=grad), expected(inputs, grad=grad)
    half_step = torch.finfo(dtype).eps / 2
    for name in ("M", "d_key", "d_value"):
        allowed = 1e-5 if name == "M" and offset == 100 else 1e-5 + half_step
        assert (actual[name].double() - truth[name]).norm() <= allowed * truth[name].norm(), name


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("size", [2.0**-9, 2.0**9], ids=["small", "large"])
def test_float16_has_room_for_matrices_it_cannot_hold(size):
    """M is around 2^-23 or 2^13, Q M around V: beside its subnormals, or where Q^T dZ of one more factor overflows."""
    query, key, value = qkv(1, 1, 40, 70, 16, 16)
    check([(query / size).half(), (key * size).half(), (value * size).half()], forward_only=True)


@pytest.mark.usefixtures("shared")
def test_same_bits_every_time():
    inputs = [t.half() for t in qkv(2, 2, 70, 130, 16, 16)]
    grad = torch.randn(2, 2, 70, 16).half()
    first, second = (run(inputs, grad=grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_results_lie_tokens_first():
    inputs = [t.float().to(DEVICE) for t in qkv(2, 2, 5, 7, 16, 20)]
    out, state = triton.forward(*inputs, None, 0.3)
    for t in (out, *triton.backward(out, *inputs, None, 0.3, state)):
        assert t.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", ["float64", "wide", "no_images", "no_queries"])
def test_what_the_kernels_leave_to_plain_pytorch(case):
    shape = {"wide": (1, 1, 5, 7, 129, 16), "no_images": (0, 1, 5, 7, 8, 8), "no_queries": (1, 1, 0, 7, 8, 8)}
    inputs = qkv(*shape.get(case, (1, 1, 5, 7, 8, 8)))
    inputs = [t.to(DEVICE, torch.float64 if case == "float64" else torch.float32) for t in inputs]
    out, state = triton.forward(*inputs, None, 0.3)
    plain, plain_state = aten.forward(*inputs, None, 0.3)
    assert torch.equal(out, plain)
    assert out.transpose(1, 2).is_contiguous()
    grads = triton.backward(out, *inputs, None, 0.3, state)
    for actual, expected in zip(grads, aten.backward(plain, *inputs, None, 0.3, plain_state), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [64, 80])
def test_wide_float32_heads_need_shared_memory(monkeypatch, width, dtype):
    monkeypatch.setattr(triton, "shared_memory", lambda device: 101_376)
    query, _, value = (t.to(DEVICE, dtype) for t in qkv(1, 1, 3, 3, width, 16))
    assert triton.fits(query, value) == (width == 64 or dtype == torch.float16)


def test_backend_triton_with_gradients():
    assert "triton" in backends(DEVICE)
    leaves = [t.float().to(DEVICE).requires_grad_() for t in qkv(1, 2, 9, 12, 16, 16)]
    mask = padding(1, 12).to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        out = taylor_attention(*leaves, mask, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_no_second_derivative():
    leaves = [t.float().to(DEVICE).requires_grad_() for t in qkv(1, 1, 3, 3, 16, 16)]
    out = taylor_attention(*leaves, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises((UnsupportedError, RuntimeError), match=r"second derivative|once_differentiable"):
        grad.sum().backward()


def test_backend_cpu_is_named_where_it_cannot_run():
    if INTERPRETED:
        assert backends("cpu") == ("aten", "cpu", "reference", "triton")
    else:
        with pytest.raises(InputError, match="backend 'cpu' takes tensors on the CPU, not on cuda:0"):
            taylor_attention(*(t.to(DEVICE) for t in qkv(1, 1, 4, 4, 4, 4)), backend="cpu")
