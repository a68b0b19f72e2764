"""The workload as data: a graph of typed operations, which every cost model and simulator reads, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Primitive = Literal["multiply", "shift", "add"]
OperandKind = Literal["activation", "weight"]
VectorKind = Literal["exp", "div", "sqrt", "add", "mul", "compare", "erf", "tanh", "move"]
OpKind = Literal["matmul", "conv", "vector"]


@dataclass(frozen=True)
class Operand:
    """One tensor that an operation reads or writes.

    tensor    its name, unique in the workload: "op3.out", "blocks.0.attn.qkv.weight", "input"
    shape     without any padding
    bits      width of one element as it is stored and moved
    kind      "weight" (a parameter, or codes) or "activation"
    producer  id of the operation that wrote it; None for weights and the model's inputs
    """

    tensor: str
    shape: tuple[int, ...]
    bits: int
    kind: OperandKind
    producer: str | None = None


@dataclass(frozen=True)
class Operation:
    """One operation.

    id, module   its number ("op12", or "op12.1", ... for the rest of what the framework runs as one kernel), and the
                 qualified name of the module that it belongs to
    kind         "matmul" (m x k by k x n, `count` of them), "conv" (as the matmul of its lowering: m = output pixels
                 times images, k = kernel times input channels of a group, n = output channels of a group,
                 count = groups) or "vector" (`elements` of one element-wise kind)
    step         inside attention: "qk", "softmax", "av"; or "1" to "6", the step of Algorithm 1 ("M", "apply" in the
                 affine form); "codes" (binarisers), "predict" (sparse attention), "bias" (carried by Taylor attention)
    primitive    what a product is made of: multiply, shift or add
    bits         of the left operand, the right operand, and the partial sums
    vector       the element-wise kind; elements counts scalar operations
    """

    id: str
    module: str
    kind: OpKind
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    step: str = ""
    primitive: Primitive = "multiply"
    m: int = 0
    k: int = 0
    n: int = 0
    count: int = 1
    bits: tuple[int, int, int] = (32, 32, 32)
    vector: VectorKind | None = None
    elements: int = 0

    @property
    def macs(self) -> int:
        """Products summed, whatever their primitive; 0 for vector work."""
        return self.m * self.k * self.n * self.count


@dataclass(frozen=True)
class Workload:
    """What one forward pass does.

    model, input_shape   the model's class, and the shape of its input with the batch
    operations           in an order in which they can run
    unknown              operators that no rule knows, with how often each was met: never dropped in silence
    """

    model: str
    input_shape: tuple[int, ...]
    operations: tuple[Operation, ...]
    unknown: dict[str, int]

    @property
    def macs(self) -> int:
        """Products summed over all matmuls and convolutions, of every primitive."""
        return sum(operation.macs for operation in self.operations)

    def count(self, primitive: Primitive) -> int:
        """Products of one primitive."""
        return sum(operation.macs for operation in self.operations if operation.primitive == primitive)
