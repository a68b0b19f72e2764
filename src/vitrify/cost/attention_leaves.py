"""vitrify's attention cores and binarisers in a trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitrify.cost.graph import Operand
from vitrify.cost.tensors import numel
from vitrify.cost.trace import Tracer
from vitrify.nn import KSH, Hamming, LearnedThreshold, Taylor, TaylorSparse, TokenMean
from vitrify.nn.bias import bias_term
from vitrify.nn.binarise import Binariser
from vitrify.ops.taylor.cpu import tokens_first

Forward = Callable[..., Tensor]


def taylor(
    tracer: Tracer,
    module: Taylor,
    forward: Forward,
    form: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """First-order attention in either form; a carried bias is added as it runs, and so is all of the squares' form."""
    if module.squares:
        with tracer.builder.phases("M", "M", "apply"):
            return forward(query, key, value, attn_mask, **options)
    with tracer.paused():
        # The shapes, and what the core refuses: masks, dropout.
        forward(query, key, value, attn_mask, **{**options, "bias": None})
        out = tokens_first(query, query.shape[2], value.shape[3])
    operands = [tracer.operand(t) for t in (query, key, value)]
    if attn_mask is not None:
        mask = tracer.operand(attn_mask)
        operands[1:] = [tracer.builder.vector("compare", [x, mask], x.shape) for x in operands[1:]]
    tracer.bind(out, (affine if form == "affine" else algorithm1)(tracer, *operands))
    bias = options.get("bias")
    if bias is None or module.bias == "drop":
        return out
    with tracer.builder.phases("bias"):
        return out + bias_term(bias, value, attn_mask)


def affine(tracer: Tracer, query: Operand, key: Operand, value: Operand) -> Operand:
    """vbar + Q M, M = c (K - kbar)^T (V - vbar): n d d_v products, d d_v for c, and n d d_v more to apply it."""
    g = tracer.builder
    sizes = _Sizes.of(query, key, value)
    with g.phases("M"), g.kernel():
        _, centred_key = _centre(tracer, key)
        vbar, centred_value = _centre(tracer, value)
        product = g.matmul(
            (centred_key, centred_value), (sizes.dim, sizes.keys, sizes.value_dim), sizes.of_context, sizes.heads
        )
        M = g.vector("mul", [product], sizes.of_context)
    with g.phases("apply"), g.kernel():
        applied = g.matmul((query, M), (sizes.queries, sizes.dim, sizes.value_dim), sizes.of_out, sizes.heads)
        return g.vector("add", [applied, vbar], sizes.of_out)


def algorithm1(tracer: Tracer, query: Operand, key: Operand, value: Operand) -> Operand:
    """ViTALiTy's Algorithm 1, one kernel a step; products n d d_v twice, n d for the denominators, d_v for v_sum."""
    g = tracer.builder
    sizes = _Sizes.of(query, key, value)
    with g.phases("1"), g.kernel():
        _, centred = _centre(tracer, key)
    with g.phases("2"):
        context = g.matmul((centred, value), (sizes.dim, sizes.keys, sizes.value_dim), sizes.of_context, sizes.heads)
    with g.phases("3"), g.kernel():
        key_sum = _column_sum(tracer, centred)
        value_sum = _column_sum(tracer, value)
    with g.phases("4"), g.kernel():
        rows = (*sizes.of_out[:-1], 1)
        weights = g.matmul((query, key_sum), (sizes.queries, sizes.dim, 1), rows, sizes.heads)
        denominator = g.vector("add", [weights], rows)
    with g.phases("5"), g.kernel():
        scaled = g.vector("mul", [value_sum], value_sum.shape)
        applied = g.matmul((query, context), (sizes.queries, sizes.dim, sizes.value_dim), sizes.of_out, sizes.heads)
        numerator = g.vector("add", [applied, scaled], sizes.of_out)
    with g.phases("6"):
        return g.vector("div", [numerator, denominator], sizes.of_out)


@dataclass(frozen=True)
class _Sizes:
    """Of one head: tokens and widths; and the number of heads in the batch, with the shapes of M and of the output."""

    queries: int
    keys: int
    dim: int
    value_dim: int
    heads: int
    of_context: tuple[int, ...]
    of_out: tuple[int, ...]

    @classmethod
    def of(cls, query: Operand, key: Operand, value: Operand) -> _Sizes:
        batch, heads, queries, dim = query.shape
        keys, value_dim = value.shape[2:]
        outer = (batch, heads)
        return cls(queries, keys, dim, value_dim, batch * heads, (*outer, dim, value_dim), (*outer, queries, value_dim))


def _column_sum(tracer: Tracer, x: Operand) -> Operand:
    return tracer.builder.vector("add", [x], (*x.shape[:2], 1, x.shape[3]), numel(x.shape))


def _centre(tracer: Tracer, x: Operand) -> tuple[Operand, Operand]:
    """Append the mean over the tokens and the difference from it, and return both."""
    total = _column_sum(tracer, x)
    mean = tracer.builder.vector("div", [total], total.shape)
    return mean, tracer.builder.vector("add", [x, mean], x.shape)


def sparse(
    tracer: Tracer,
    module: TaylorSparse,
    forward: Forward,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> Tensor:
    """Softmax over predicted entries: the predictor's product on narrow integers, and the rest as if all were kept.

    How many are kept depends on the data, so this is an upper bound.
    """
    g = tracer.builder
    biased = options.get("bias") is not None and module.bias == "carry"
    order: tuple[Any, ...] = ("qk", "predict", ("softmax", "av"))
    predictor = 1
    if biased:  # `biased_sparse` predicts first
        order, predictor = ("predict", "qk", ("softmax", "av")), 0
    first = len(g.operations)
    with g.phases(*order):
        out = forward(query, key, value, *args, **options)
    products = [i for i in range(first, len(g.operations)) if g.operations[i].kind == "matmul"]
    width = 2 * module.bits + key.shape[-1].bit_length()
    g.relabel(products[predictor], bits=(module.bits, module.bits, width))
    return out


def hamming(tracer: Tracer, module: Hamming, forward: Forward, *args: Any, **options: Any) -> Tensor:
    """Attention on codes, as it runs: products with codes only add, which the rule for products sees by their width."""
    phases = ("M", "apply") if module.order == "linear" else ("qk", "av")
    with tracer.builder.phases(*phases):
        return forward(*args, **options)


def binariser(tracer: Tracer, module: Binariser, x: Tensor) -> Tensor:
    """Codes of one bit; hashing first computes its kernel: distances to the anchors by one product, and exp."""
    g, operand = tracer.builder, tracer.operand(x)
    with tracer.paused():
        out = x.new_empty(*x.shape[:-1], module.code_dim)
    rows = (*x.shape[:-1], 1)
    with g.phases("codes"), g.kernel():
        inputs = [operand]
        if isinstance(module, LearnedThreshold):
            inputs.append(tracer.operand(module.threshold))
        elif isinstance(module, TokenMean):
            inputs.append(g.vector("div", [g.vector("add", [operand], rows, x.numel())], rows))
        elif isinstance(module, KSH):
            inputs = [_hash(tracer, module, operand)]
        codes = g.vector("compare", inputs, out.shape, bits=1)
    return tracer.bind(out, codes)


def _hash(tracer: Tracer, module: KSH, x: Operand) -> Operand:
    """exp(-|x - anchor|^2 / 2 width) - mean, times the hash weights; |x - a|^2 = |x|^2 - 2 x.a + |a|^2.

    The anchors' own squares and offset are constants, and -1 / (2 width) is held by them and by the factor of |x|^2.
    """
    g = tracer.builder
    *batch, heads, tokens, dim = x.shape
    anchors, bits = module.anchors.shape[1], module.code_dim
    count, kernel, rows = heads * numel(tuple(batch)), (*x.shape[:-1], anchors), (*x.shape[:-1], 1)
    centred = g.vector("add", [x, tracer.operand(module.anchors)], x.shape)
    squares = g.vector("mul", [centred], x.shape)
    length = g.vector("add", [squares], rows, numel(x.shape))
    length = g.vector("mul", [length, tracer.operand(module.width)], rows)
    nearness = g.matmul((centred, tracer.operand(module.anchors)), (tokens, dim, anchors), kernel, count)
    for offset in (length, tracer.operand(module.anchors)):
        nearness = g.vector("add", [nearness, offset], kernel)
    nearness = g.vector("compare", [nearness], kernel)
    nearness = g.vector("exp", [nearness], kernel)
    nearness = g.vector("add", [nearness, tracer.operand(module.mean)], kernel)
    weight = tracer.operand(module.weight)
    return g.matmul((nearness, weight), (tokens, anchors, bits), (*x.shape[:-1], bits), count)
