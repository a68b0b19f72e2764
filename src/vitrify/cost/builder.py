"""Builds the graph: operations are appended in the order in which they run, with the module and step they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from vitrify.cost.graph import Operand, Operation, OpKind, Primitive, VectorKind
from vitrify.cost.tensors import Tensors, accumulator_bits, numel

Phases = tuple[str | tuple[str, str], ...]


class Builder:
    """The graph so far.

    modules  qualified names of the modules that are running, the innermost last
    A kernel is what the framework runs in one go: its operations are "op7", "op7.1", "op7.2", ... and what passes
    between them need not go through memory.
    """

    def __init__(self) -> None:
        self.tensors = Tensors()
        self.operations: list[Operation] = []
        self.softmaxes: list[tuple[int, int]] = []
        self.unknown: Counter[str] = Counter()
        self.modules: list[str] = [""]
        self._kernel = -1
        self._index: int | None = None
        self._phases: Phases = ("",)

    @contextmanager
    def kernel(self) -> Iterator[None]:
        """Group what is recorded inside as one kernel; a kernel within a kernel is part of it."""
        if self._index is not None:
            yield
            return
        self._kernel, self._index = self._kernel + 1, 0
        try:
            yield
        finally:
            self._index = None

    @contextmanager
    def phases(self, *phases: str | tuple[str, str]) -> Iterator[None]:
        """Label what is recorded inside: with the first label up to the first matmul, then with the second, ...

        The last one stays. A pair labels what comes before the matmul, and the matmul itself.
        """
        outer, self._phases = self._phases, phases
        try:
            yield
        finally:
            self._phases = outer

    def vector(
        self,
        kind: VectorKind,
        inputs: Sequence[Operand],
        shape: Sequence[int],
        elements: int | None = None,
        *,
        bits: int | None = None,
    ) -> Operand:
        """Append element-wise work and return its output, as wide as the first input unless `bits` says.

        elements: scalar operations, one per element of the output by default.
        """
        shape = tuple(shape)
        phase = self._phases[0]
        widths = [operand.bits for operand in inputs]
        # Biases, means and indices may have other widths than the data, which comes first.
        bits = widths[0] if bits is None else bits
        return self._append(
            "vector",
            inputs,
            shape,
            bits,
            bits=(widths[0], widths[min(1, len(widths) - 1)], bits),
            step=phase if isinstance(phase, str) else phase[0],
            vector=kind,
            elements=numel(shape) if elements is None else elements,
        )

    def matmul(
        self,
        inputs: Sequence[Operand],
        sizes: tuple[int, int, int],
        shape: Sequence[int],
        count: int = 1,
        *,
        kind: OpKind = "matmul",
        primitive: Primitive = "multiply",
        bits: tuple[int, int, int] | None = None,
        out_bits: int | None = None,
    ) -> Operand:
        """Append `count` products of (m, k) and (k, n), sizes = (m, k, n), and return the output.

        inputs: left and right operand first. By default the widths are those of the operands, and of the sums what
        floats are summed in.
        """
        left, right = inputs[:2]
        if bits is None:
            bits = left.bits, right.bits, accumulator_bits(max(left.bits, right.bits))
        m, k, n = sizes
        phase = self._phases[0]
        out = self._append(
            kind,
            inputs,
            tuple(shape),
            max(left.bits, right.bits) if out_bits is None else out_bits,
            step=phase if isinstance(phase, str) else phase[1],
            primitive=primitive,
            m=m,
            k=k,
            n=n,
            count=count,
            bits=bits,
        )
        if len(self._phases) > 1:
            self._phases = self._phases[1:]
        return out

    def relabel(self, index: int, **changes: object) -> None:
        """Replace fields of an operation that is already there."""
        self.operations[index] = replace(self.operations[index], **changes)  # type: ignore[arg-type]

    def extra_output(self, operand: Operand) -> Operand:
        """Add to the last operation a further output shaped as `operand`, and return it."""
        last = self.operations[-1]
        extra = replace(operand, tensor=f"{last.id}.out{len(last.outputs)}", producer=last.id)
        self.relabel(-1, outputs=(*last.outputs, extra))
        return extra

    def _append(
        self, kind: OpKind, inputs: Sequence[Operand], shape: tuple[int, ...], out_bits: int, **fields: object
    ) -> Operand:
        name = self._next_id()
        out = Operand(f"{name}.out", shape, out_bits, "activation", name)
        operation = Operation(name, self.modules[-1], kind, tuple(inputs), (out,), **fields)  # type: ignore[arg-type]
        self.operations.append(operation)
        return out

    def _next_id(self) -> str:
        if self._index is None:
            self._kernel += 1
            return f"op{self._kernel}"
        self._index += 1
        return f"op{self._kernel}" if self._index == 1 else f"op{self._kernel}.{self._index - 1}"
