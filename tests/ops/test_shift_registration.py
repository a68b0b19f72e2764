"""shift_linear and shift_ste under the dispatcher, torch.compile, torch.export, torch.fx, ONNX and autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrify.ops import pack_codes, shift_decode, shift_linear, shift_quantize, shift_ste

OUT, IN = 6, 9


def layer(bits: int = 4, variant: str = "ps", seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return input, packed codes, exponent, bias and the decoded weight, all float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=generator)
    codes, exponent = shift_quantize(weight, bits, variant)
    input = torch.randn(2, 5, IN, generator=generator)
    decoded = shift_decode(codes, exponent, bits, variant)
    return input, pack_codes(codes, bits), exponent, torch.randn(OUT, generator=generator), decoded


class Packed(nn.Module):
    def __init__(self, bits: int = 4, variant: str = "ps") -> None:
        super().__init__()
        self.bits, self.variant = bits, variant
        _, codes, exponent, bias, _ = layer(bits, variant)
        self.register_buffer("codes", codes)
        self.register_buffer("exponent", exponent)
        self.bias = nn.Parameter(bias)

    def forward(self, input):
        return shift_linear(input, self.codes, self.exponent, self.bias, bits=self.bits, variant=self.variant)


class Latent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)))

    def forward(self, input):
        return F.linear(input, shift_ste(self.weight))


@pytest.mark.parametrize(
    ("bits", "biased", "dtype"), [(4, True, torch.float32), (5, False, torch.bfloat16)], ids=["4-bias", "5-plain"]
)
def test_opcheck(bits, biased, dtype):
    input, codes, exponent, bias, _ = layer(bits)
    input, bias = (t.to(dtype).requires_grad_() for t in (input, bias))
    args = (input, codes, exponent, bias if biased else None, bits, "ps", "float")
    torch.library.opcheck(torch.ops.vitrify.shift_linear.default, args)


@pytest.mark.parametrize("make", [Packed, Latent])
def test_compile_fullgraph(make):
    module, (input, *_) = make(), layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    input.requires_grad_()
    assert torch.equal(compiled(input), module(input))
    leaves = [input, *module.parameters()]
    expected = torch.autograd.grad(module(input).square().sum(), leaves)
    actual = torch.autograd.grad(compiled(input).square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Packed, Latent])
def test_compile_inductor(make):
    module, (input, *_) = make(), layer()
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(input), module(input))


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_export_holds_plain_aten_only(strict):
    module, (input, *_) = Packed(), layer()
    shapes = {"input": {0: torch.export.Dim.AUTO, 1: torch.export.Dim("tokens", min=2, max=64)}}
    program = torch.export.export(module, (input,), dynamic_shapes=shapes, strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not any("vitrify" in target for target in targets)
    other = torch.randn(3, 11, IN, generator=torch.Generator().manual_seed(4))
    assert torch.equal(program.module()(other), module(other))


def test_jit_trace_holds_plain_aten_only():
    module, (input, *_) = Packed(), layer()
    traced = torch.jit.trace(module, (input,))
    assert "vitrify::" not in str(traced.graph)
    assert torch.equal(traced(input), module(input))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "variant"), [(3, "q"), (4, "ps"), (5, "ps"), (6, "q")])
def test_onnx_computes_the_same(bits, variant, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    module, (input, *_) = Packed(bits, variant).eval(), layer()
    path = tmp_path / "shift.onnx"
    torch.onnx.export(module, (input,), path, dynamo=True, verbose=False)
    (out,) = runtime.InferenceSession(path).run(None, {"input": input.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), module(input).detach())


def test_fx_sees_one_node_per_op():
    for module, op in ((Packed(), shift_linear), (Latent(), shift_ste)):
        graph = torch.fx.symbolic_trace(module)
        calls = [n.target for n in graph.graph.nodes if n.op == "call_function"]
        assert op in calls
        input = layer()[0]
        assert torch.equal(graph(input), module(input))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_as_for_linear(compiled, dtype):
    input, codes, exponent, bias, weight = layer()
    run = torch.compile(shift_linear, fullgraph=True, backend="aot_eager") if compiled else shift_linear
    leaves = [input.requires_grad_(), bias.requires_grad_()]
    with torch.autocast("cpu", dtype):
        out, expected = run(input, codes, exponent, bias), F.linear(input, weight, bias)
        wide = run(input.double(), codes, exponent, bias.double())
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert wide.dtype == torch.float64
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    wanted = torch.autograd.grad(expected.float().square().sum(), leaves)
    torch.testing.assert_close(grads, wanted)
    assert all(g.dtype == torch.float32 for g in grads)


def test_meta_tensors_give_shapes():
    input, codes, exponent, bias, weight = (t.to("meta") for t in layer())
    out = shift_linear(input, codes, exponent, bias)
    assert (out.shape, out.dtype, out.device.type) == ((2, 5, OUT), torch.float32, "meta")
    codes, exponent = shift_quantize(weight)
    assert (codes.shape, exponent.shape) == ((OUT, IN), (OUT,))
    assert shift_decode(codes, exponent).shape == (OUT, IN)
