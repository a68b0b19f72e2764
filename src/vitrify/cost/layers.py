"""Operations of a workload as layers of the Eyeriss model."""

from __future__ import annotations

from dataclasses import replace

from vitrify.cost.eyeriss import Layer
from vitrify.cost.graph import Operation


def lowered(operation: Operation) -> Layer:
    """Return the matmul that an operation is, or that a convolution is lowered to (its windows written out)."""
    return Layer(n=operation.m, m=operation.n, c=operation.k)


def layer_of(operation: Operation) -> Layer:
    """Return one of the operation's `count` equal layers.

    A 2-d convolution keeps its rows and its kernel, read from the shapes of its operands (images, channels, height,
    width; channels out, channels in, kernel); anything else is a matmul.
    """
    if operation.kind != "conv" or len(operation.inputs) < 2 or not operation.outputs:
        return lowered(operation)
    shapes = operation.inputs[0].shape, operation.inputs[1].shape, operation.outputs[0].shape
    if any(len(shape) != 4 for shape in shapes):
        return lowered(operation)
    (images, _, h, w), (_, _, r, s), (_, _, e, f) = shapes
    # The operands do not tell the padding; without it the quotient is the stride, with it a little above.
    stride = max(1, round(h / e))
    layer = Layer(images, operation.n, operation.k // (r * s), e, f, r, s, h, w, stride)
    return layer if layer.macs * operation.count == operation.macs else lowered(operation)


def stacked(layer: Layer, count: int) -> Layer:
    """Return `count` layers as one of so many more rows: what the authors make of heads, images and groups.

    It shares one right operand between all of them, which they do not have in common.
    """
    return replace(layer, n=layer.n * count)
