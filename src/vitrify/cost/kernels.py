"""Kernels that are more than one operation: what normalisation, softmax, activations and attention consist of."""

from __future__ import annotations

from collections.abc import Sequence

from vitrify.cost.builder import Builder
from vitrify.cost.graph import Operand, VectorKind
from vitrify.cost.tensors import numel


def chain(g: Builder, kinds: str, inputs: Sequence[Operand], shape: Sequence[int], bits: int | None = None) -> Operand:
    """Append element-wise kinds one after another, each over `shape`; `kinds` are separated by spaces."""
    out: Operand | None = None
    for kind in kinds.split():
        out = g.vector(_kind(kind), inputs if out is None else [out], shape, bits=bits)
    assert out is not None
    return out


def reduce(
    g: Builder, kinds: str, after: str, inputs: Sequence[Operand], shape: Sequence[int], bits: int | None = None
) -> Operand:
    """Append `kinds` over the first input's elements, the last of which leaves `shape`, then `after` over that."""
    source = inputs[0].shape
    *before, last = kinds.split()
    value = chain(g, " ".join(before), inputs, source, bits) if before else None
    operands = inputs if value is None else [value]
    value = g.vector(_kind(last), operands, shape, numel(source), bits=bits)
    return chain(g, after, [value], shape, bits) if after else value


def softmax(g: Builder, x: Operand, dim: int, bits: int | None = None) -> Operand:
    """exp(x - max) / sum: compare, add, exp, add, div, each once per element."""
    rows = _without(x.shape, dim)
    size = numel(x.shape)
    first = len(g.operations)
    peak = g.vector("compare", [x], rows, size, bits=bits)
    shifted = g.vector("add", [x, peak], x.shape, bits=bits)
    powers = g.vector("exp", [shifted], x.shape, bits=bits)
    total = g.vector("add", [powers], rows, size, bits=bits)
    out = g.vector("div", [powers, total], x.shape, bits=bits)
    g.softmaxes.append((first, len(g.operations) - 1))
    return out


def normalise(
    g: Builder, x: Operand, rows: Sequence[int], affine: Sequence[Operand], *, centred: bool = True
) -> Operand:
    """Layer norm, group norm, or with centred=False RMS norm: `rows` is the shape of the statistics.

    Per element: an add for the mean and one for the difference, a square, an add for the variance, the product with
    1/std, and for each of weight and bias one more. Per row: two divisions by the count, a square root, a reciprocal.
    """
    size = numel(x.shape)
    if centred:
        mean = g.vector("div", [g.vector("add", [x], rows, size)], rows)
        x = g.vector("add", [x, mean], x.shape)
    squares = g.vector("mul", [x], x.shape)
    variance = g.vector("div", [g.vector("add", [squares], rows, size)], rows)
    inverse = g.vector("div", [g.vector("sqrt", [variance], rows)], rows)
    return scale_and_shift(g, g.vector("mul", [x, inverse], x.shape), affine)


def scale_and_shift(g: Builder, x: Operand, affine: Sequence[Operand]) -> Operand:
    """Multiply by the first operand and add the second, as far as there are any."""
    kinds: tuple[VectorKind, ...] = ("mul", "add")
    for kind, operand in zip(kinds, affine, strict=False):
        x = g.vector(kind, [x, operand], x.shape)
    return x


def attention(
    g: Builder,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Operand | None = None,
    *,
    causal: bool = False,
) -> Operand:
    """Softmax attention over (..., N, D): the scaled query, its product with the keys, softmax, the one with V.

    A causal mask halves nothing: all entries are computed, as FlopCounterMode counts them. One compare applies it.
    """
    *heads, queries, dim = query.shape
    keys, value_dim, count = key.shape[-2], value.shape[-1], numel(tuple(heads))
    with g.phases(("qk", "qk"), ("softmax", "av"), "av"), g.kernel():
        scaled = g.vector("mul", [query], query.shape)
        scores = g.matmul([scaled, key], (queries, dim, keys), (*heads, queries, keys), count)
        if mask is not None:
            scores = g.vector("add", [scores, mask], scores.shape)
        if causal:
            scores = g.vector("compare", [scores], scores.shape)
        weights = softmax(g, scores, -1)
        return g.matmul([weights, value], (queries, keys, value_dim), (*heads, queries, value_dim), count)


def _without(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    sizes = list(shape)
    if sizes:
        sizes[dim] = 1
    return tuple(sizes)


def _kind(name: str) -> VectorKind:
    return name  # type: ignore[return-value]  # the tables of aten.py, which a test reads
