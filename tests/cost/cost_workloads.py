"""Small workloads built by hand."""

import math
from itertools import pairwise

from vitrify.cost.graph import Operand, Operation, Workload


def matmul(m, k, n, *, number=0, module="layer", step="", primitive="multiply", bits=(32, 32, 32), out=None, count=1):
    name = f"op{number}"
    return Operation(
        name,
        module,
        "matmul",
        (
            Operand(f"{name}.left", (count, m, k), bits[0], "activation"),
            Operand(f"{name}.right", (count, k, n), bits[1], "weight"),
        ),
        (Operand(f"{name}.out", (count, m, n), out or bits[0], "activation", name),),
        step,
        primitive,
        m,
        k,
        n,
        count,
        bits,
    )


def conv(images, channels_in, channels_out, size, kernel, stride=1, groups=1, number=0, bits=(32, 32, 32)):
    """Padded so that the output is size / stride wide."""
    name, out = f"op{number}", size // stride
    return Operation(
        name,
        "conv",
        "conv",
        (
            Operand(f"{name}.x", (images, channels_in, size, size), bits[0], "activation"),
            Operand(f"{name}.w", (channels_out, channels_in // groups, kernel, kernel), bits[1], "weight"),
        ),
        (Operand(f"{name}.out", (images, channels_out, out, out), bits[0], "activation", name),),
        m=images * out * out,
        k=kernel * kernel * channels_in // groups,
        n=channels_out // groups,
        count=groups,
        bits=bits,
    )


def vectors(kinds, shape, *, first=0, module="norm", step="", bits=32):
    """Element-wise kinds one after another, each reading the result of the one before."""
    elements = math.prod(shape)
    names = [f"op{first + i}" for i in range(len(kinds))]
    tensors = [Operand("x", shape, bits, "activation")]
    tensors += [Operand(f"{name}.out", shape, bits, "activation", name) for name in names]
    return [
        Operation(name, module, "vector", (source,), (result,), step, vector=kind, elements=elements)
        for name, kind, (source, result) in zip(names, kinds, pairwise(tensors), strict=True)
    ]


def workload(*operations, **unknown):
    return Workload("Model", (1, 3, 224, 224), operations, unknown)


def deit_base(batch=1, width=768, heads=12):
    tokens, operations = 197, [conv(batch, 3, width, 224, 16, 16)]
    for block in range(12):
        for name, step, (m, k, n), count in (
            ("attn.qkv", "", (batch * tokens, width, 3 * width), 1),
            ("attn", "qk", (tokens, width // heads, tokens), batch * heads),
            ("attn", "av", (tokens, tokens, width // heads), batch * heads),
            ("attn.proj", "", (batch * tokens, width, width), 1),
            ("mlp.fc1", "", (batch * tokens, width, 4 * width), 1),
            ("mlp.fc2", "", (batch * tokens, 4 * width, width), 1),
        ):
            module = f"blocks.{block}.{name}"
            operations.append(matmul(m, k, n, number=len(operations), module=module, step=step, count=count))
    operations.append(matmul(batch, width, 1000, number=len(operations), module="head"))
    return workload(*operations)
