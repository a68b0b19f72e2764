"""Tokens rounded outside of the layer: the op that takes them, and the graphs that torch.compile fuses them in."""

from __future__ import annotations

import shutil
import types

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops import gpu, pack_codes, shift, shift_linear, shift_quantize
from vitrify.ops.shift import cpu, reference

ROUNDED = torch.ops.vitrify.shift_linear_rounded
SUMS = torch.ops.vitrify.shift_integer_sums
KINDS = ["int8", "float8"]
# What the graph of a CPU calls after rounding, for codes of 4 bits with a 0.
OP = {"int8": "shift_integer_sums", "float8": "shift_linear_rounded"}
kinds = pytest.mark.parametrize("kind", KINDS)
inductor = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor compiles C++")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Let the many compilations here of one function not count as recompilations."""
    torch._dynamo.reset()


def layer(width: int, out: int = 7, bits: int = 4, variant: str = "ps") -> tuple[torch.Tensor, ...]:
    """Return packed codes, exponent and bias, float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=generator) * torch.logspace(-3, 3, out)[:, None]
    codes, exponent = shift_quantize(weight, bits, variant)
    return pack_codes(codes, bits), exponent, torch.randn(out, generator=generator)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Packed(nn.Module):
    """A layer behind what usually stands before one."""

    def __init__(self, kind: str, front: nn.Module, width: int = 24, out: int = 7) -> None:
        super().__init__()
        self.kind, self.front = kind, front
        codes, exponent, bias = layer(width, out)
        self.register_buffer("codes", codes)
        self.register_buffer("exponent", exponent)
        self.bias = nn.Parameter(bias)

    def forward(self, input):
        return shift_linear(self.front(input), self.codes, self.exponent, self.bias, activations=self.kind)

    def opaque(self, input):
        """Compute the same with the op that rounds inside."""
        arguments = (self.codes, self.exponent, self.bias, 4, "ps", self.kind)
        return torch.ops.vitrify.shift_linear(self.front(input), *arguments)


def calls(function, *arguments):
    """Return the result under torch.compile, without Inductor, and the names of vitrify's ops in the graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    out = torch.compile(function, fullgraph=True, backend=counter)(*arguments)
    (graph,) = counter.graphs
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return out, [name.removeprefix("vitrify.") for name in names if "vitrify" in name]


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("bits", "variant"), [(3, "ps"), (4, "ps"), (4, "q"), (6, "ps")])
def test_rounding_and_the_rest_make_up_the_layer(kind, dtype, bits, variant):
    codes, exponent, bias = layer(13, bits=bits, variant=variant)
    for shape in ((2, 5, 13), (13,), (0, 13)):
        input = tokens(*shape).to(dtype)
        values, scale = reference.quantize_tokens(input, kind)
        for added in (bias.to(dtype), None):
            out = ROUNDED(values, scale, codes, exponent, added, bits, variant, dtype)
            expected = shift_linear(input, codes, exponent, added, bits=bits, variant=variant, activations=kind)
            assert out.dtype == dtype
            assert torch.equal(out, expected)
            fallback = reference.rounded_linear(values, scale, codes, exponent, added, bits, variant, dtype)
            torch.testing.assert_close(out, fallback)


@kinds
@pytest.mark.parametrize("bits", [4, 6])
def test_opcheck(kind, bits):
    codes, exponent, bias = layer(13, bits=bits)
    values, scale = reference.quantize_tokens(tokens(2, 5, 13), kind)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if kind == "int8":
        checks.append("test_schema")  # which multiplies the arguments: torch cannot multiply E4M3
    for added in (bias, None):
        arguments = (values, scale, codes, exponent, added, bits, "ps", torch.bfloat16)
        torch.library.opcheck(ROUNDED.default, arguments, test_utils=checks)


@pytest.mark.parametrize(("bits", "variant", "width"), [(3, "ps", 13), (3, "q", 2), (4, "ps", 13)])
def test_integer_sums_and_their_scales_make_up_the_layer(bits, variant, width):
    codes, exponent, bias = layer(width, bits=bits, variant=variant)
    assert cpu.always_integers(bits, variant, width)
    for shape in ((2, 5, width), (width,), (0, width)):
        input = tokens(*shape)
        values, scale = reference.quantize_tokens(input, "int8")
        sums, unit = SUMS(values, codes, exponent, bits, variant)
        assert (sums.dtype, sums.shape) == (torch.int32, (*shape[:-1], 7))
        expected = shift_linear(input, codes, exponent, bias, bits=bits, variant=variant, activations="int8")
        assert torch.equal(cpu.scaled(sums, unit, scale, bias, torch.float32), expected)
        unit.zero_()  # as a compiled graph may, that has no further use for it
        assert SUMS(values, codes, exponent, bits, variant)[1].all()
        torch.library.opcheck(SUMS.default, (values, codes, exponent, bits, variant))


@torch.no_grad()
@pytest.mark.parametrize(("bits", "variant", "width"), [(4, "q", 24), (6, "ps", 24), (4, "ps", 1)])
def test_formats_whose_powers_may_lie_further_apart_keep_the_whole_op(bits, variant, width):
    codes, exponent, bias = layer(width, bits=bits, variant=variant)

    def run(x):
        return shift_linear(x, codes, exponent, bias, bits=bits, variant=variant, activations="int8")

    out, names = calls(run, tokens(3, width))
    assert names == ["shift_linear_rounded"]
    assert torch.equal(out, run(tokens(3, width)))


def test_rounded_tokens_have_no_gradient():
    codes, exponent, bias = layer(13)
    values, scale = reference.quantize_tokens(tokens(2, 13), "int8")
    out = ROUNDED(values, scale, codes, exponent, bias.requires_grad_(), 4, "ps", torch.float32)
    with pytest.raises(UnsupportedError, match="call shift_linear on the floats"):
        out.sum().backward()


@kinds
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_graph_without_gradients_rounds_itself(kind, off):
    module, input = Packed(kind, nn.LayerNorm(24)), tokens(3, 5, 24)
    with off():
        out, names = calls(module, input)
        assert names == [OP[kind]]
        assert torch.equal(out, module(input))
    module.requires_grad_(False)
    assert calls(module, input)[1] == [OP[kind]]
    assert calls(module, input.clone().requires_grad_())[1] == ["shift_linear"]


@kinds
def test_a_graph_with_gradients_is_as_before(kind):
    module, input = Packed(kind, nn.LayerNorm(24)), tokens(3, 24).requires_grad_()
    out, names = calls(module, input)
    assert names == ["shift_linear"]
    leaves = [input, *module.parameters()]
    for a, e in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(module(input).square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


@torch.no_grad()
def test_floats_and_float64_are_as_before():
    for kind, dtype in (("float", torch.float32), ("int8", torch.float64), ("float8", torch.float64)):
        module = Packed(kind, nn.Identity()).to(dtype)
        assert calls(module, tokens(3, 24).to(dtype))[1] == ["shift_linear"]


@kinds
@torch.no_grad()
def test_autocast_rounds_its_dtype(kind):
    module, input = Packed(kind, nn.Identity()), tokens(3, 24)
    expected = module.bfloat16()(input.bfloat16())
    module.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, names = calls(module, input)
    assert names == [OP[kind]]
    assert torch.equal(out, expected)


@kinds
@torch.no_grad()
def test_any_strides_and_no_tokens(kind):
    module = Packed(kind, nn.Identity())
    for input in (
        tokens(24, 5, 3).transpose(0, 2),
        tokens(3, 40)[:, 3:27],
        tokens(1, 24).expand(4, 24),
        tokens(24),
        tokens(0, 24),
    ):
        out, names = calls(module, input)
        assert names == [OP[kind]]
        assert torch.equal(out, module(input))


@torch.no_grad()
def test_bad_input_is_refused_as_ever():
    module = torch.compile(Packed("int8", nn.Identity()), backend="aot_eager")
    with pytest.raises(InputError, match="22 inputs of 4 bits are packed into 11 bytes"):
        module(tokens(3, 22))
    with pytest.raises(InputError, match="bias is float32 but input is bfloat16"):
        module(tokens(3, 24).bfloat16())


def test_which_gpus_round_in_the_graph(monkeypatch):
    """On one that the kernels take; to E4M3 if Triton can there, and if E4M3 holds the weights."""
    with FakeTensorMode():
        input = torch.empty(2, 24, device="cuda")
    # Only now: torch 2.11 asks a GPU that is said to be there, for a fake tensor, too.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def answers(major, minor):
        properties = types.SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        cases = (("int8", 4), ("int8", 6), ("float8", 5), ("float8", 6))
        return [shift._rounds_in_the_graph(input, None, bits, kind) for kind, bits in cases]

    assert gpu.INSTALLED
    assert answers(7, 5) == [False] * 4
    assert answers(8, 0) == [True, True, False, False]
    assert answers(8, 9) == answers(9, 0) == [True, True, True, False]


@pytest.mark.slow
@inductor
@kinds
@torch.no_grad()
def test_inductor_gives_the_bits_of_eager(kind):
    """With any number of tokens, and tokens that are zero, tiny, infinite or not numbers."""
    module = Packed(kind, nn.Identity(), width=75)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for count in (9, 2, 130):
        input = tokens(2, count, 75) * tokens(2, count, 1, seed=2).exp()
        if count > 2:
            input[0, 0], input[0, 1, 0], input[0, 2, 0] = 0, float("nan"), float("inf")
            input[0, 3] *= 1e-36
            input[0, 4, 0] = -float("inf")
            input[0, 5] = torch.arange(75) / 2 + 90  # ties, once divided by a scale of 1
        actual, expected = compiled(input), module(input)
        assert expected.isnan().any() == (count > 2)
        assert torch.equal(actual.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.slow
@inductor
@kinds
@torch.no_grad()
@pytest.mark.parametrize("front", [nn.LayerNorm(768), nn.GELU()], ids=["norm", "gelu"])
def test_a_norm_or_activation_and_the_rounding_are_one_kernel(kind, front):
    """The generated function that computes them writes the values; its result is that of the opaque op."""
    module, input = Packed(kind, front, width=768), tokens(2, 197, 768)
    out, (code,) = run_and_get_code(torch.compile(module, fullgraph=True, dynamic=False), input)
    assert torch.equal(out, torch.compile(module.opaque, fullgraph=True, dynamic=False)(input))
    assert code.count("cpp_pybinding(") == (2 if kind == "int8" else 1)
    signature = next(line for line in code.splitlines() if "cpp_pybinding(" in line)
    assert ("int8_t*" if kind == "int8" else "at::Float8_e4m3fn*") in signature
    assert ("layer_norm" if isinstance(front, nn.LayerNorm) else "gelu") in signature


@pytest.mark.slow
@inductor
@torch.no_grad()
def test_between_two_integer_products_runs_one_kernel():
    """Scales, bias, GELU and rounding: floats of the hidden layer are read by nobody else."""
    module = nn.Sequential(Packed("int8", nn.Identity(), width=96, out=128), Packed("int8", nn.GELU(), width=128))
    input = tokens(5, 96)
    out, (code,) = run_and_get_code(torch.compile(module, fullgraph=True, dynamic=False), input)
    assert torch.equal(out, module(input))
    first, second, third = (line for line in code.splitlines() if "cpp_pybinding(" in line)
    assert "gelu" in second
    assert all(kind in second for kind in ("const int32_t*", "int8_t*"))
    assert "gelu" not in first + third


@pytest.mark.slow
@inductor
@kinds
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_rounded_once(kind, dtype):
    """Inductor keeps the norm's result in float32: values differ from eager's by a step at most; README.md says why."""
    norm, input = nn.LayerNorm(200).to(dtype), tokens(50, 200).to(dtype)

    def rounded(x):
        return shift._rounded_in_the_graph(norm(x), kind)

    (values, scale), (expected, expected_scale) = torch.compile(rounded, fullgraph=True)(input), rounded(input)
    torch.testing.assert_close(scale, expected_scale, rtol=torch.finfo(dtype).eps / 2, atol=0)
    if kind == "int8":
        assert (values.int() - expected.int()).abs().max() <= 1
    else:
        # Bytes of one sign are E4M3 numbers in their order; both zeros are 0.
        places = [torch.where(b < 0, -(b & 127), b).int() for b in (t.view(torch.int8) for t in (values, expected))]
        assert (places[0] - places[1]).abs().max() <= 1


@pytest.mark.slow
@inductor
@torch.no_grad()
def test_what_a_gelu_returns_is_computed_once():
    """Its erf stands in one loop of the generated code: the rounding reads the result."""
    module = Packed("int8", nn.GELU(), width=768)
    _, (code,) = run_and_get_code(torch.compile(module, fullgraph=True, dynamic=False), tokens(2, 64, 768))
    assert code.count(".erf()") == 1
