"""Finds softmax attention in a graph by its shape: a product of two activations, softmax, and a second product."""

from __future__ import annotations

from vitrify.cost.builder import Builder


def label_attention(g: Builder) -> None:
    """Label "qk", "softmax" and "av" around each softmax between two products of activations; others have no step."""
    at = {operation.id: index for index, operation in enumerate(g.operations)}
    readers: dict[int, list[int]] = {}
    for index, operation in enumerate(g.operations):
        for operand in operation.inputs:
            if operand.producer is not None:
                readers.setdefault(at[operand.producer], []).append(index)
    sources = {
        index: [at[o.producer] for o in operation.inputs if o.producer is not None]
        for index, operation in enumerate(g.operations)
    }
    for first, last in g.softmaxes:
        if g.operations[first].step:
            continue
        before, after = _reach(g, sources, first), _reach(g, readers, last)
        scores, products = before & _products(g, before), after & _products(g, after)
        if not scores or not products:
            continue
        between = _on_a_path(scores, first, readers, before) | _on_a_path(products, last, sources, after)
        for index in between | set(range(first, last + 1)):
            g.relabel(index, step="softmax")
        for index in scores:
            g.relabel(index, step="qk")
        for index in products:
            g.relabel(index, step="av")


def _reach(g: Builder, neighbours: dict[int, list[int]], start: int) -> set[int]:
    """Return what can be reached from `start` through vector work, up to and including the first products."""
    found: set[int] = set()
    stack = list(neighbours.get(start, []))
    while stack:
        index = stack.pop()
        if index not in found:
            found.add(index)
            if g.operations[index].kind == "vector":
                stack += neighbours.get(index, [])
    return found


def _products(g: Builder, indices: set[int]) -> set[int]:
    """Return those that are products of two activations."""
    return {
        index
        for index in indices
        if g.operations[index].kind == "matmul"
        and all(operand.kind == "activation" for operand in g.operations[index].inputs[:2])
    }


def _on_a_path(starts: set[int], end: int, neighbours: dict[int, list[int]], within: set[int]) -> set[int]:
    """Return the vector work in `within` that lies between `starts` and `end`, following `neighbours`."""
    found: set[int] = set()
    stack = [n for start in starts for n in neighbours.get(start, [])]
    while stack:
        index = stack.pop()
        if index in within and index not in found and index != end:
            found.add(index)
            stack += neighbours.get(index, [])
    return found - starts
