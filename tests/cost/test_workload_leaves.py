"""vitrify's own modules in a workload: primitives, widths and steps, against what the modules say that they cost."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from vitrify import Workload, workload
from vitrify.cost.graph import Operation
from vitrify.cost.serialise import check_graph
from vitrify.nn import (
    Attention,
    Core,
    Hamming,
    IntLinear,
    ShiftConv2d,
    ShiftLinear,
    Softmax,
    Taylor,
    TaylorSparse,
)

HEADS, DIM, TOKENS, BATCH = 3, 8, 21, 2
X = torch.zeros(BATCH, TOKENS, HEADS * DIM)
EACH = BATCH * HEADS


def attention(core: Core, bias: Tensor | None = None) -> Workload:
    """The workload of an attention module around that core."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = core

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = self.core(query, key, value, scale=0.3, bias=bias)
            return out

    shape = BATCH, HEADS, TOKENS, DIM
    graph = workload(Biased(), example_inputs=[torch.zeros(shape)] * 3)
    check_graph(graph)
    assert graph.unknown == {}
    return graph


def products(graph: Workload) -> list[Operation]:
    return [op for op in graph.operations if op.kind != "vector"]


def vectors(graph: Workload) -> Counter[tuple[str, str | None]]:
    found: Counter[tuple[str, str | None]] = Counter()
    for op in graph.operations:
        if op.kind == "vector":
            found[op.step, op.vector] += op.elements
    return found


def test_affine_taylor():
    graph = attention(Taylor())
    first, second = products(graph)
    assert (first.step, first.m, first.k, first.n, first.count) == ("M", DIM, TOKENS, DIM, EACH)
    assert (second.step, second.m, second.k, second.n, second.count) == ("apply", TOKENS, DIM, DIM, EACH)
    assert first.id in {operand.producer for op in graph.operations for operand in op.inputs}
    n_d = EACH * TOKENS * DIM
    assert vectors(graph) == {
        ("M", "add"): 4 * n_d,  # two column sums, two differences
        ("M", "div"): 2 * EACH * DIM,
        ("M", "mul"): EACH * DIM**2,
        ("apply", "add"): n_d,
    }


def test_algorithm_1_step_by_step():
    core = Taylor()
    module = nn.Sequential(Attention(HEADS * DIM, HEADS, core))
    graph = workload(module, example_inputs=X, taylor="algorithm1")
    check_graph(graph)
    steps = [op.step for op in graph.operations if op.step]
    assert steps == sorted(steps)
    assert set(steps) == set("123456")
    sizes = {op.step: (op.m, op.k, op.n, op.count) for op in products(graph) if op.step}
    assert sizes == {
        "2": (DIM, TOKENS, DIM, EACH),
        "4": (TOKENS, DIM, 1, EACH),
        "5": (TOKENS, DIM, DIM, EACH),
    }
    n_d = EACH * TOKENS * DIM
    assert {key: count for key, count in vectors(graph).items() if key[0]} == {
        ("1", "add"): 2 * n_d,
        ("1", "div"): EACH * DIM,
        ("3", "add"): 2 * n_d,
        ("4", "add"): EACH * TOKENS,
        ("5", "mul"): EACH * DIM,
        ("5", "add"): n_d,
        ("6", "div"): n_d,
    }


@pytest.mark.parametrize(
    "core",
    [
        Softmax(),
        Softmax(fused=False),
        Softmax(fused=False, scale_on="scores", value_first=True, upcast=True),
        Taylor(),
        Taylor(squares=True),
        TaylorSparse(0.02),
        Hamming(HEADS, DIM),
        Hamming(HEADS, DIM, form="taylor"),
        Hamming(HEADS, DIM, order="quadratic"),
        Hamming(HEADS, DIM, binariser="ksh"),
        Hamming(HEADS, DIM, binariser="ksh", share=True, order="quadratic"),
    ],
    ids=str,
)
def test_products_are_what_the_core_says(core):
    """`multiplications` counts one head's products; the squares' denominators are one more column."""
    graph = attention(core)
    extra = TOKENS * DIM if getattr(core, "squares", False) else 0
    expected = core.multiplications(TOKENS, TOKENS, DIM, DIM) + extra
    assert graph.count("multiply") == EACH * expected


@pytest.mark.parametrize("fused", [True, False])
def test_steps_of_softmax(fused):
    graph = attention(Softmax(fused=fused))
    assert [op.step for op in products(graph)] == ["qk", "av"]
    entries = EACH * TOKENS**2
    found = vectors(graph)
    assert {kind: found["softmax", kind] for kind in ("exp", "div", "compare")} == dict.fromkeys(
        ("exp", "div", "compare"), entries
    )
    assert found["softmax", "add"] == 2 * entries
    kernels = {op.id.partition(".")[0] for op in graph.operations if op.step}
    assert (len(kernels) == 1) is fused


def test_bias_carried_by_taylor_mixes_tokens():
    bias = torch.zeros(HEADS, TOKENS, TOKENS)
    carried, dropped = attention(Taylor(), bias), attention(Taylor(bias="drop"), bias)
    (mixing,) = [op for op in products(carried) if op.step == "bias"]
    assert mixing.macs == EACH * TOKENS**2 * DIM
    assert carried.macs - dropped.macs == mixing.macs


@pytest.mark.parametrize("biased", [False, True])
def test_sparse_attention_predicts_with_narrow_integers(biased):
    bias = torch.zeros(HEADS, TOKENS, TOKENS) if biased else None
    graph = attention(TaylorSparse(0.02, bits=4, low_rank=False), bias)
    by_step = {op.step: op for op in products(graph)}
    assert set(by_step) == {"predict", "qk", "av"}
    assert {op.macs for op in by_step.values()} == {EACH * TOKENS**2 * DIM}
    assert by_step["predict"].bits == (4, 4, 12)
    assert by_step["qk"].bits == by_step["av"].bits == (32, 32, 32)


@pytest.mark.parametrize("binariser", ["learned", "token_mean", "ksh"])
@pytest.mark.parametrize("form", ["published", "taylor"])
def test_hamming_attention_only_adds(binariser, form):
    core = Hamming(HEADS, DIM, binariser=binariser, form=form)
    bits = core.query_binariser.code_dim
    graph = attention(core)
    adds = [op for op in products(graph) if op.primitive == "add"]
    assert [(op.step, op.m, op.k, op.n, op.count, op.bits) for op in adds] == [
        ("M", bits, TOKENS, DIM, EACH, (1, 32, 32)),
        ("apply", TOKENS, bits, DIM, EACH, (1, 32, 32)),
    ]
    codes = [operand for op in graph.operations for operand in op.outputs if operand.bits == 1]
    assert len(codes) == 2
    assert all(code.shape == (BATCH, HEADS, TOKENS, bits) for code in codes)
    assert [op.inputs[0].producer for op in adds] == [codes[1].producer, codes[0].producer]
    hashing = [op for op in products(graph) if op.primitive == "multiply"]
    assert sum(op.macs for op in hashing) == 2 * EACH * core.query_binariser.multiplications(TOKENS)
    assert {op.step for op in hashing} == ({"codes"} if binariser == "ksh" else set())
    exponents = {key: count for key, count in vectors(graph).items() if key[1] == "exp"}
    assert exponents == ({("codes", "exp"): 2 * EACH * TOKENS * 25} if binariser == "ksh" else {})


def test_quadratic_order_multiplies_by_small_integers():
    counting, weighing = products(attention(Hamming(HEADS, DIM, order="quadratic")))
    assert (counting.step, counting.primitive, counting.bits) == ("qk", "add", (1, 1, 5))
    assert (weighing.step, weighing.primitive, weighing.bits) == ("av", "multiply", (5, 32, 32))
    assert weighing.macs == EACH * TOKENS**2 * DIM


def test_codes_stay_codes_in_half_precision():
    core = Hamming(HEADS, DIM).half()
    graph = workload(Attention(HEADS * DIM, HEADS, core).half(), example_inputs=X.half())
    adds = [op for op in products(graph) if op.primitive == "add"]
    assert [op.bits[0] for op in adds] == [1, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_shift_linear(packed):
    layer, _ = ShiftLinear.from_linear(nn.Linear(24, 10), bits=5)
    if packed:
        layer.pack_()
    product, bias = workload(nn.Sequential(layer), example_inputs=X).operations
    assert (product.primitive, product.m, product.k, product.n) == ("shift", BATCH * TOKENS, 24, 10)
    assert product.bits == (32, 5, 32)
    assert [operand.tensor for operand in product.inputs[1:]] == [
        "0.codes" if packed else "0.weight",
        "0.exponent",
    ]
    assert (bias.vector, bias.elements) == ("add", BATCH * TOKENS * 10)


@pytest.mark.parametrize("packed", [False, True])
def test_shift_convolution(packed):
    layer = ShiftConv2d.adopt_(nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False), bits=4)
    if packed:
        layer.pack_()
    (product,) = workload(layer, (6, 7, 9)).operations
    assert (product.kind, product.primitive, product.bits) == ("conv", "shift", (32, 4, 32))
    assert (product.m, product.k, product.n, product.count) == (4 * 5, 3 * 9, 4, 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_linear(bits):
    layer = IntLinear.adopt_(nn.Linear(24, 10), bits=bits)
    graph = workload(layer, example_inputs=X)
    (product,) = products(graph)
    assert (product.primitive, product.bits, product.macs) == ("multiply", (8, bits, 32), BATCH * TOKENS * 240)
    assert [operand.bits for operand in product.inputs] == [8, bits]
    rows = BATCH * TOKENS
    assert vectors(graph) == {
        ("", "compare"): rows * 24,
        ("", "div"): rows,
        ("", "mul"): rows * (24 + 2 * 10),
        ("", "add"): rows * 10,
    }


def test_depthwise_convolution_on_v():
    module = nn.ModuleList([Attention(HEADS * DIM, HEADS, value_conv=3)])

    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: Tensor) -> Tensor:
            return module[0](x, grid=(4, 5), num_prefix_tokens=1)  # type: ignore[no-any-return]

    graph = workload(Grid(), example_inputs=X)
    (conv,) = [op for op in graph.operations if op.kind == "conv"]
    assert (conv.m, conv.k, conv.n, conv.count) == (BATCH * 20, 9, 1, HEADS * DIM)
