"""From a PyTorch model to a Relax module that calls MatAdd and MatShift as the tensor expressions of `operators`."""

from __future__ import annotations

import math
from typing import Any

import torch
import tvm
from torch import Tensor, fx, nn
from tvm import relax, topi
from tvm.relax.frontend.torch import from_exported_program

from vitrify.errors import UnsupportedError
from vitrify.tvm import leaves, operators

# relax.OpPatternKind: what follows the first (bias, activation) may share its loops; nothing shares an opaque one's.
OUT_ELEMENTWISE_FUSABLE, OPAQUE = 4, 8


def relax_module(model: nn.Module, images: Tensor) -> tvm.IRModule:
    """Return the module, with the function `main(images) -> output`: weights are constants, all shapes fixed.

    model: in eval mode, on the CPU, in float32, shift layers packed; it is changed by `use_leaves_`.
    Raises whatever torch.export or TVM's frontend raise for what they do not know.
    """
    leaves.use_leaves_(model)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        return from_exported_program(program, unwrap_unit_return_tuple=True, custom_convert_map=CONVERSIONS)


def _shift_linear(node: fx.Node, importer: Any) -> relax.Var:
    rows, packed, exponent, bias, bits, variant, activations = importer.retrieve_args(node)
    if activations != "float":
        raise UnsupportedError(f"activations={activations!r}: TVM gets shift layers on float or int8 activations")
    out = _call(importer, operators.mat_shift, rows, _by_input(importer, packed), exponent, bits, variant)
    return out if bias is None else importer.block_builder.emit(out + bias)


def _mat_shift_integer(node: fx.Node, importer: Any) -> relax.Var:
    rows, packed, bits, variant = importer.retrieve_args(node)
    return _call(importer, operators.mat_shift_integer, rows, _by_input(importer, packed), bits, variant)


def _by_input(importer: Any, packed: relax.Expr) -> relax.Var:
    """Return the codes transposed to (bytes, out); TVM folds this, so the transposed codes are what a library holds."""
    return importer.block_builder.emit(relax.op.permute_dims(packed))


def _mat_add(node: fx.Node, importer: Any) -> relax.Var:
    code, rows, codes, transposed = importer.retrieve_args(node)
    return _call(importer, operators.mat_add, code, rows, codes, transposed=transposed)


def _call(
    importer: Any, expression: Any, *args: Any, pattern: int = OUT_ELEMENTWISE_FUSABLE, **options: Any
) -> relax.Var:
    call = importer.block_builder.call_te(expression, *args, primfunc_attrs={"op_pattern": pattern}, **options)
    return importer.block_builder.emit(call)


def _gelu(node: fx.Node, importer: Any) -> relax.Var:
    """GELU with an erf that LLVM can put into vectors; TVM's own calls the C library once per number."""
    x = importer.retrieve_args(node)[0]
    builder = importer.block_builder
    erf = builder.emit_te(topi.fast_erf, builder.emit(x * relax.const(math.sqrt(0.5), "float32")))
    half = builder.emit(x * relax.const(0.5, "float32"))
    return builder.emit(half * (erf + relax.const(1.0, "float32")))


def _max(node: fx.Node, importer: Any) -> relax.Var:
    """Maximum and its first place along an axis; TVM's own sorts the whole axis for it."""
    x, axis, keep = (*importer.retrieve_args(node), False)[:3]
    builder = importer.block_builder
    return builder.emit(relax.Tuple([relax.op.max(x, axis, keep), relax.op.argmax(x, axis, keep)]))


def _amax(node: fx.Node, importer: Any) -> relax.Var:
    return importer.block_builder.emit(relax.op.max(*importer.retrieve_args(node)))


def _amin(node: fx.Node, importer: Any) -> relax.Var:
    return importer.block_builder.emit(relax.op.min(*importer.retrieve_args(node)))


def _where(node: fx.Node, importer: Any) -> relax.Var:
    """A select in loops of its own: in a product's it is put into vectors, for which TVM 0.27 writes wrong CUDA."""
    return _call(importer, topi.where, *importer.retrieve_args(node), pattern=OPAQUE)


CONVERSIONS = {
    "shift_linear.default": _shift_linear,
    "mat_shift_integer.default": _mat_shift_integer,
    "mat_add.default": _mat_add,
    "gelu.default": _gelu,
    "amax.default": _amax,
    "amin.default": _amin,
    "max.dim": _max,
    "where.self": _where,
}
