"""The Triton kernels of mixtures against the definition: interpreted if TRITON_INTERPRET=1, else on the GPU.

`test_experts_triton.py` runs this file in a process of its own, because Triton decides at import whether it interprets;
`test_experts_triton_gpu.py` imports its tests.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from experts_inputs import PATTERNS, experts_of, pattern, routed
from hypothesis import given, settings
from hypothesis import strategies as st

from vitrify.ops.experts import dense, triton
from vitrify.ops.shift import pack_codes, reference, shift_quantize
from vitrify.ops.shift.reference import decoded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's tl.dot reads bfloat16 as integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
FORMATS = [(4, "ps"), (3, "q"), (5, "q"), (6, "ps")]

# (tokens, width, columns): widths that tiles divide and others, more tokens than one program of each kernel takes
SHAPES = [(1, 16, 16), (63, 40, 24), (197, 33, 70), (577, 64, 130)]
if not INTERPRETED:
    SHAPES += [(n, 768, 3072) for n in (1, 63, 197, 577, 1576, 12_608)] + [(50_432, 192, 768), (1000, 3072, 768)]


@pytest.fixture(params=[True, False], ids=["in_registers", "in_memory"])
def where(request, monkeypatch):
    """Decode codes in registers or in memory, however many tokens there are."""
    monkeypatch.setattr(triton, "MOST_TOKENS", 10**9 if request.param else 0)


def run(x, router, layers, activations="float", *, gather=True, scatter=True):
    """Return the tokens by expert, and both experts' linear layers on them, on the CPU."""
    order, counts = triton.order_tokens(x.to(DEVICE), *(t.to(DEVICE) for t in router))
    moved = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in layers]
    return order.cpu(), triton.linear(x.to(DEVICE), order, counts, *moved, activations, gather, scatter).cpu()


def check(out, x, index, layers, activations="float", lost=2**-22):
    """Compare with the definition in float64: one rounding of the result, and what float32 sums may lose.

    Tensor cores add 8 products and more at a time and cut off what float32 does not hold: 2^-22 of the largest sum.
    """
    weight, bias, codes, exponent, shift_bias, bits, variant = layers
    shift = decoded(codes, exponent, x.shape[1], bits, variant, torch.float32)
    rounded = x
    if activations != "float":
        values, scale = reference.quantize_tokens(x, activations)
        rounded = torch.where(index[:, None] == 1, values.double() * scale.double(), x.double())
    truth = dense(rounded.double(), index, experts_of(weight, bias, shift, shift_bias))
    sizes = dense(rounded.abs().double(), index, experts_of(weight.abs(), bias.abs(), shift.abs(), shift_bias.abs()))
    info = torch.finfo(x.dtype)
    allowed = info.eps * truth.abs() + lost * (x.shape[1] / 8 + 4) * sizes + info.smallest_normal * info.eps
    assert out.dtype == x.dtype
    excess = ((out.double() - truth).abs() - allowed).max()
    assert excess <= 0, f"beyond what is allowed by {excess:.3e}"


def linears(width, columns, bits, variant, dtype, seed=0):
    """Return weight, bias, codes, exponent, bias of the shift expert, bits and variant."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, columns, width, generator=generator) / width**0.5
    biases = torch.randn(2, columns, generator=generator).to(dtype)
    codes, exponent = shift_quantize(weights[1].to(dtype), bits, variant)
    return weights[0].to(dtype), biases[0], pack_codes(codes, bits), exponent, biases[1], bits, variant


@pytest.mark.usefixtures("nan_poison", "where")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_token_gets_its_experts_row(shape, dtype):
    tokens, width, columns = shape
    for number, name in enumerate(PATTERNS):
        index = pattern(name, tokens)
        x, router = routed(index, width, dtype)
        layers = linears(width, columns, *FORMATS[number % len(FORMATS)], dtype)
        order, out = run(x, router, layers)
        assert torch.equal(order.long(), index.argsort(stable=True))
        check(out, x, index, layers)


@pytest.mark.usefixtures("nan_poison", "where")
@pytest.mark.parametrize("bits", [3, 4, 5, 6])
@pytest.mark.parametrize("variant", ["ps", "q"])
@pytest.mark.parametrize("width", [64, 45])
def test_every_format(width, variant, bits):
    index = pattern("random", 40)
    for dtype in DTYPES:
        x, router = routed(index, width, dtype)
        layers = linears(width, 20, bits, variant, dtype)
        check(run(x, router, layers)[1], x, index, layers)


@pytest.mark.usefixtures("nan_poison", "where")
def test_gathered_alone_and_scattered_alone():
    """The first and the second layer of an MLP: together they do what gather and scatter do."""
    index, dtype = pattern("random", 150), DTYPES[-1]
    x, router = routed(index, 32, dtype)
    layers = linears(32, 24, 4, "ps", dtype)
    order, whole = run(x, router, layers)
    grouped = run(x, router, layers, scatter=False)[1]
    assert torch.equal(grouped, whole[order.long()])
    counts = torch.bincount(index, minlength=2).int()
    moved = [t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in (x[order.long()], order, counts, *layers)]
    assert torch.equal(triton.linear(*moved, "float", False, True).cpu(), whole)


@pytest.mark.usefixtures("nan_poison", "where")
@pytest.mark.parametrize("has_e4m3", [True, False])
@pytest.mark.parametrize("activations", ["int8", "float8"])
@pytest.mark.parametrize(("bits", "variant"), [(3, "q"), (4, "ps"), (4, "q"), (5, "ps"), (6, "q")])
def test_the_second_experts_tokens_rounded(bits, variant, activations, has_e4m3, monkeypatch):
    """In the format that holds the weights, or in bfloat16; the first expert's tokens stay as they are."""
    if not has_e4m3:
        monkeypatch.setattr(triton, "has_e4m3", lambda device: False)
    elif not triton.has_e4m3(torch.device(DEVICE)):
        pytest.skip("this GPU has no E4M3: see the other case")
    shapes = SHAPES[1:2] if INTERPRETED and (bits, variant) != (4, "ps") else SHAPES[1:3]
    for shape, dtype in itertools.product(shapes, DTYPES):
        tokens, width, columns = shape
        index = pattern("random", tokens)
        x, router = routed(index, width, dtype)
        layers = linears(width, columns, bits, variant, dtype)
        out = run(x, router, layers, activations)[1]
        # A Hopper's sums of E4M3 products keep 14 bits.
        check(out, x, index, layers, activations, 2**-22 if activations == "int8" or not has_e4m3 else 2**-13)


@pytest.mark.usefixtures("nan_poison", "where")
@pytest.mark.parametrize(("bits", "variant"), [(3, "ps"), (3, "q"), (4, "ps")])
def test_integer_sums_are_the_shift_layers(bits, variant):
    """Bit for bit, where int8 holds the weights."""
    index, dtype = torch.ones(130, dtype=torch.int64), DTYPES[-1]
    x, router = routed(index, 80, dtype)
    layers = linears(80, 40, bits, variant, dtype)
    _, _, codes, exponent, bias, *_ = layers
    expected = reference.linear(x, codes, exponent, bias, bits, variant, "int8")
    assert torch.equal(run(x, router, layers, "int8")[1], expected)


@pytest.mark.usefixtures("nan_poison")
def test_without_biases_with_a_float_shift_weight_and_rows_apart():
    index, dtype = pattern("alternating", 70), DTYPES[-1]
    x, (router, _) = routed(index, 32, dtype, biased=False)
    apart = torch.full((70, 50), torch.nan, dtype=dtype)[:, 3:35].copy_(x)
    weight, _, codes, exponent, *_ = linears(32, 24, 4, "ps", dtype)
    shift = decoded(codes, exponent, 32, 4, "ps", dtype)
    order, counts = triton.order_tokens(apart.to(DEVICE), router.to(DEVICE), None)
    arguments = [t.to(DEVICE) for t in (apart, order, counts, weight)]
    out = triton.linear(*arguments, None, shift.to(DEVICE), None, None, 4, "ps", "float", True, True).cpu()
    nothing = torch.zeros(24, dtype=dtype)
    check(out, x, index, (weight, nothing, codes, exponent, nothing, 4, "ps"))


@pytest.mark.usefixtures("nan_poison", "where")
def test_any_strides():
    """Every tensor is half of a larger one: its neighbours are no neighbours in memory."""
    index, dtype = pattern("random", 40), DTYPES[-1]
    x, router = routed(index, 32, dtype)
    layers = linears(32, 24, 4, "ps", dtype)

    def apart(tensor):
        return tensor.new_full((*tensor.shape, 2), 99).to(DEVICE)[..., 1].copy_(tensor)

    order, expected = run(x, router, layers)
    groups = triton.order_tokens(*(apart(t) for t in (x, *router)))
    assert torch.equal(groups[0].cpu(), order)
    moved = [apart(t) if isinstance(t, torch.Tensor) else t for t in layers]
    assert torch.equal(triton.linear(apart(x), *groups, *moved, "float", True, True).cpu(), expected)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), max_size=80), st.integers(1, 50))
def test_the_order_is_a_stable_partition(goes, repeated):
    """The first expert's tokens, then the second's, each in their old order, however blocks and chunks fill."""
    index = torch.tensor(goes, dtype=torch.int64).repeat(repeated)
    x, router = routed(index, 4, torch.float16)
    order, counts = triton.order_tokens(x.to(DEVICE), *(t.to(DEVICE) for t in router))
    assert order.tolist() == index.argsort(stable=True).tolist()
    assert counts.tolist() == torch.bincount(index, minlength=2).tolist()


def test_close_calls_go_where_the_router_would_send_them():
    """Ties go to the first; logits are rounded before they are compared, so that what rounds to a tie is one."""
    x = torch.tensor([[1.0, 0.0], [1.0, 2.0**-12], [1.0, 2.0**-10], [0.0, -1.0]], dtype=torch.float16)
    router = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float16)
    order, counts = triton.order_tokens(x.to(DEVICE), router.to(DEVICE), None)
    assert order.tolist() == [0, 1, 3, 2]
    assert counts.tolist() == [3, 1]


def test_offsets_beyond_32_bits():
    """Three tokens that lie 2^30 numbers apart, in memory of which nothing else is touched."""
    storage = torch.empty(2**31 + 16, dtype=torch.float16, device=DEVICE)
    index = torch.tensor([1, 0, 1])
    x, router = routed(index, 16, torch.float16)
    far = storage.as_strided((3, 16), (2**30, 1)).copy_(x)
    layers = linears(16, 16, 4, "ps", torch.float16)
    assert torch.equal(run(far, router, layers)[1], run(x, router, layers)[1])


@pytest.mark.usefixtures("where")
def test_same_bits_every_time():
    index, dtype = pattern("random", 130), DTYPES[-1]
    x, router = routed(index, 48, dtype)
    layers = linears(48, 40, 4, "ps", dtype)
    first, second = (run(x, router, layers) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_the_others():
    """The same token gives the same bits, whoever shares its tile."""
    x, router = routed(pattern("random", 130), 48, DTYPES[-1])
    layers = linears(48, 40, 4, "ps", DTYPES[-1])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(3))
    assert torch.equal(run(x[order], router, layers)[1], run(x, router, layers)[1][order])


def test_no_tokens():
    x, router = routed(torch.zeros(0, dtype=torch.int64), 8, torch.float16)
    order, out = run(x, router, linears(8, 6, 4, "ps", torch.float16))
    assert (order.shape, out.shape) == ((0,), (0, 6))
