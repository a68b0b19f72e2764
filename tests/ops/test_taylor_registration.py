"""The registered op under the dispatcher, torch.compile, torch.export, torch.fx and autocast."""

from __future__ import annotations

import pytest
import torch
from taylor_inputs import packed, padding, qkv
from torch import nn

from vitrify.errors import UnsupportedError
from vitrify.ops import (
    gpu,
    selected_backend,
    sparse_softmax_attention,
    taylor_attention,
    taylor_sparse_attention,
    taylor_squares_attention,
    taylor_weights,
)
from vitrify.ops.taylor import aten, cpu


class Core(nn.Module):
    def forward(self, query, key, value, mask=None):
        return taylor_attention(query, key, value, mask)


class SparseCore(nn.Module):
    def forward(self, query, key, value):
        out, density = taylor_sparse_attention(query, key, value, threshold=0.1)
        return out + taylor_squares_attention(query, key, value), density


class Shapely:
    """What a caller of the fx-traced ops looks like: plain functions of proxies."""

    @staticmethod
    def every_op(query, key, value):
        return (
            taylor_attention(query, key, value=value)
            + taylor_squares_attention(query, key, value)
            + taylor_sparse_attention(query, key, value, threshold=0.1)[0]
            + sparse_softmax_attention(query, key, value, threshold=0.1)[0]
            + taylor_weights(query, key) @ value
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(grad, masked, dtype):
    inputs = [t.to(dtype).requires_grad_(grad) for t in packed(*qkv(2, 3, 9, 9, 4, 4))]
    keep = padding(2, 9)[:, 0, 0] if masked else None
    torch.library.opcheck(torch.ops.vitrify.taylor_attention.default, (*inputs, keep, 0.5))


def test_opcheck_backward():
    inputs = [t.float() for t in qkv(2, 3, 9, 7, 4, 5)]
    out, M, kbar, vbar = torch.ops.vitrify.taylor_attention(*inputs, None, 0.5)
    args = (torch.randn_like(out), *inputs, None, 0.5, M, kbar, vbar)
    torch.library.opcheck(torch.ops.vitrify.taylor_attention_backward.default, args)


def test_fake_strides_are_the_real_ones():
    inputs = [t.float() for t in qkv(2, 3, 9, 7, 4, 5)]
    real = torch.ops.vitrify.taylor_attention(*inputs, None, 0.5)
    fake = torch.ops.vitrify.taylor_attention(*(t.to("meta") for t in inputs), None, 0.5)
    assert [(t.shape, t.stride(), t.dtype) for t in real] == [(t.shape, t.stride(), t.dtype) for t in fake]


def test_second_derivative_is_an_error():
    inputs = [t.requires_grad_() for t in qkv(1, 1, 4, 4, 2, 2)]
    (d_query,) = torch.autograd.grad(taylor_attention(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative: backend='aten' has"):
        d_query.sum().backward()
    assert torch.autograd.gradgradcheck(lambda *t: taylor_attention(*t, backend="aten"), inputs)


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
def test_compile_fullgraph(masked):
    """aot_eager traces forward and backward through the fake kernels and autograd, without Inductor's compile time."""
    inputs = [t.float().requires_grad_() for t in qkv(2, 3, 9, 7, 4, 5)]
    mask = padding(2, 7) if masked else None
    core = Core()
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, mask), core(*inputs, mask), rtol=0, atol=0)
    expected = torch.autograd.grad(core(*inputs, mask).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs, mask).square().sum(), inputs)
    # Not to the bit: torch 2.11 makes the incoming gradient contiguous, and other strides sum in another order.
    torch.testing.assert_close(actual, expected)


def test_compile_fullgraph_sparse_and_squares():
    inputs = [t.float().requires_grad_() for t in qkv(2, 3, 9, 7, 4, 4)]
    core = SparseCore()
    out, density = torch.compile(core, fullgraph=True, backend="aot_eager")(*inputs)
    expected, expected_density = core(*inputs)
    torch.testing.assert_close(out, expected)
    assert density == expected_density
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


@pytest.mark.slow
def test_compile_inductor():
    inputs = [t.float().requires_grad_() for t in qkv(2, 3, 70, 70, 8, 8)]
    core = Core()
    compiled = torch.compile(core, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(*inputs), core(*inputs))
    compiled(*inputs).square().sum().backward()
    expected = torch.autograd.grad(core(*inputs).square().sum(), inputs)
    torch.testing.assert_close([t.grad for t in inputs], list(expected))


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_holds_plain_aten_only(strict):
    inputs = tuple(t.float() for t in qkv(2, 3, 9, 7, 4, 4))
    tokens = {2: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(
        Core(), inputs, dynamic_shapes=({2: torch.export.Dim.AUTO}, tokens, tokens), strict=strict
    )
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not any("vitrify" in target for target in targets)
    other = tuple(t.float() for t in qkv(2, 3, 5, 13, 4, 4))
    torch.testing.assert_close(program.module()(*other), taylor_attention(*other))


def test_jit_trace_holds_plain_aten_only():
    inputs = tuple(t.float() for t in qkv(2, 3, 9, 7, 4, 4))
    traced = torch.jit.trace(Core(), inputs)
    assert "vitrify::" not in str(traced.graph)
    torch.testing.assert_close(traced(*inputs), taylor_attention(*inputs))


def test_selected_backend_names_what_runs(monkeypatch):
    called = []
    for kernel in (cpu, aten):
        monkeypatch.setattr(kernel, "forward", spy(kernel.__name__.rpartition(".")[2], kernel.forward, called))
    inputs = [t.float() for t in qkv(1, 2, 9, 7, 4, 4)]
    taylor_attention(*inputs)
    assert called == ["cpu"] == [selected_backend("cpu")]
    assert selected_backend(torch.device("cuda", 1)) == ("triton" if gpu.INSTALLED else "aten")

    class Asks(torch.nn.Module):
        def forward(self, x):
            assert selected_backend(x.device) == "aten"
            return taylor_attention(x, x, x)

    called.clear()
    torch.jit.trace(Asks(), inputs[:1], check_trace=False)
    assert called == ["aten"]


def spy(name, function, called):
    def spied(*args):
        called.append(name)
        return function(*args)

    return spied


def test_fx_sees_one_node_per_op():
    graph = torch.fx.symbolic_trace(Shapely.every_op)
    calls = [n for n in graph.graph.nodes if n.op == "call_function" and "vitrify" in (n.target.__module__ or "")]
    assert [n.target for n in calls] == [
        taylor_attention,
        taylor_squares_attention,
        taylor_sparse_attention,
        sparse_softmax_attention,
        taylor_weights,
    ]
    inputs = qkv(1, 2, 9, 7, 4, 4)
    assert torch.equal(graph(*inputs), Shapely.every_op(*inputs))


@pytest.mark.parametrize("function", [taylor_attention, taylor_squares_attention])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_inputs_and_sums_in_float32(function, compiled):
    """The output is the true one rounded once: nothing on the way was rounded to bfloat16.

    Keys carry a large common offset, values none: beside one, attention would be less than a step of the output.
    """
    query, key, _ = (t.float() for t in qkv(1, 2, 64, 300, 8, 8, offset=50.0))
    value = qkv(1, 2, 64, 300, 8, 8)[2].bfloat16()  # mixed dtypes are what autocast is for
    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.autocast("cpu", torch.bfloat16):
        out = run(query, key, value)
    assert out.dtype == torch.bfloat16
    wide = function(*(t.bfloat16().double() for t in (query, key, value)))
    assert (out == wide.bfloat16()).double().mean() > 0.99


def test_autocast_keeps_the_sparse_softmax_in_float32():
    inputs = [t.float() for t in qkv(1, 2, 64, 64, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = taylor_sparse_attention(*inputs, threshold=0.0)
    assert out.dtype == torch.bfloat16
    wide, _ = taylor_sparse_attention(*(t.bfloat16().double() for t in inputs), threshold=0.0)
    # float32 sums leave only the rounding of the result, 2^-9 of it; bfloat16 scores would lose ten times that.
    assert (out.double() - wide).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * wide.abs().max() + 1e-5


def test_autocast_backward_reaches_float32_leaves():
    inputs = [t.float().requires_grad_() for t in qkv(1, 2, 20, 30, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        out = taylor_attention(*inputs)
    grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_plain_inference_calls_the_kernel_as_it_is_and_training_the_op():
    query, key, value = torch.randn(3, 1, 2, 9, 4)

    def called_op(run):
        with torch.profiler.profile() as profile:
            run()
        return "vitrify::taylor_attention" in {event.name for event in profile.events()}

    with torch.no_grad():
        direct = taylor_attention(query, key, value)
        assert not called_op(lambda: taylor_attention(query, key, value))
    learned = query.clone().requires_grad_()
    assert called_op(lambda: taylor_attention(learned, key, value))
    assert torch.equal(taylor_attention(learned, key, value), direct)
    batched = torch.func.vmap(taylor_attention)(*torch.randn(3, 2, 1, 2, 9, 4))
    assert batched.shape == (2, 1, 2, 9, 4)
