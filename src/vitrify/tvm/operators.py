"""The two operators of ShiftAddViT as TVM tensor expressions: MatAdd and MatShift. docs/papers.md 5, 7.

They say what is computed; `schedules` says in which order. `rows` are what is accumulated, and never multiplied by a
code: MatAdd picks rows, the integer MatShift moves their bits. A float has no bits that could be moved, so the float
MatShift moves the code into a float's exponent field and multiplies by that power of two, exactly.
"""

from __future__ import annotations

from typing import Literal

from tvm import te, tirx

from vitrify.ops.shift.packing import codes_per_byte
from vitrify.ops.shift.reference import lowest_level, top_level

CodeSet = Literal["binary", "sign"]

# Of float32: where its exponent and its sign begin, and what is added to the exponent.
MANTISSA_BITS, EXPONENT_BIAS, SIGN = 23, 127, tirx.const(-(2**31), "int32")


def mat_add(code: te.Tensor, rows: te.Tensor, codes: CodeSet, *, transposed: bool = False) -> te.Tensor:
    """Return out[m] = the sum of the rows that code[m] selects; nothing is multiplied.

    code: int8 (..., M, K), or (..., K, M) if `transposed`; rows: float32 (..., K, N) -> float32 (..., M, N).
    codes "binary": 1 adds a row, 0 leaves it out; "sign": +1 adds it, -1 subtracts it. Other codes are undefined.
    """
    *batch, depth, width = rows.shape
    height = code.shape[-1] if transposed else code.shape[-2]
    k = te.reduce_axis((0, depth), "k")

    def selected(*index: tirx.Var) -> tirx.Expr:
        *outer, m, n = index
        # 0, 1, -1 become no bits, all bits, all bits; a select would be clearer, but TVM 0.27 writes CUDA for a vector
        # of them that does not compile.
        chosen = code[(*outer, k, m) if transposed else (*outer, m, k)].astype("int32")
        row = tirx.reinterpret("int32", rows[(*outer, k, n)])
        bits = row & -chosen if codes == "binary" else row ^ (chosen & SIGN)
        return te.sum(tirx.reinterpret("float32", bits), axis=k)

    return te.compute((*batch, height, width), selected, name="mat_add")


def mat_shift(rows: te.Tensor, packed: te.Tensor, exponent: te.Tensor, bits: int, variant: str) -> te.Tensor:
    """Return rows @ decode(codes), the weights being made of the codes' bits; equal to `ops.shift_linear`'s product.

    rows: float32 (..., K); packed: uint8 (bytes, N), the *transpose* of what `pack_codes` returns, so that one vector
    load takes the codes of neighbouring outputs; exponent: int8 (N,) -> (..., N).
    """
    *outer, depth = rows.shape
    width = packed.shape[1]
    k = te.reduce_axis((0, depth), "k")
    decoded = te.compute(
        (depth, width), lambda i, n: _power(_code(packed, i, n, bits), exponent[n], bits, variant), name="decode"
    )
    return te.compute(
        (*outer, width), lambda *i: te.sum(rows[(*i[:-1], k)] * decoded[k, i[-1]], axis=k), name="mat_shift"
    )


def mat_shift_integer(rows: te.Tensor, packed: te.Tensor, bits: int, variant: str) -> te.Tensor:
    """Return the exact sums of rows shifted left by their codes, in units of the lowest power: int64 (..., N).

    rows: int8 (..., K); packed as `mat_shift` takes it. Summed in int32 where no sum of K terms can leave it.
    """
    *outer, depth = rows.shape
    width = packed.shape[1]
    lowest, top = lowest_level(variant), top_level(bits)
    wide = "int32" if int(depth) * 128 << (top - lowest) < 2**31 else "int64"
    k = te.reduce_axis((0, depth), "k")

    def term(*index: tirx.Var) -> tirx.Expr:
        code = _code(packed, k, index[-1], bits)
        level = code & top
        shifted = rows[(*index[:-1], k)].astype(wide) << tirx.max(level - lowest, 0).astype(wide)
        # All bits where the code is negative, and where it is not zero: no select, for mat_add's reason.
        negative = (-(code >> (bits - 1))).astype(wide)
        signed = (shifted ^ negative) - negative
        return te.sum(signed & (-tirx.min(level, 1)).astype(wide) if variant == "ps" else signed, axis=k)

    sums = te.compute((*outer, width), term, name="mat_shift_integer")
    return te.compute(sums.shape, lambda *i: sums[i].astype("int64"), name="widened")


def _code(packed: te.Tensor, k: tirx.Var, n: tirx.Var, bits: int) -> tirx.Expr:
    """Return the code of input k and output n, int32."""
    if codes_per_byte(bits) == 1:
        return packed[k, n].astype("int32")
    # Relax counts in int64.
    return (packed[k // 2, n].astype("int32") >> (k % 2 * 4).astype("int32")) & 15


def _power(code: tirx.Expr, exponent: tirx.Expr, bits: int, variant: str) -> tirx.Expr:
    """Return float32 s 2^(E - top + m), put together as the bits of a float."""
    top = top_level(bits)
    level = code & top
    power = (level + exponent.astype("int32") + (EXPONENT_BIAS - top)) << MANTISSA_BITS
    signed = power | (code >> (bits - 1)) * SIGN
    value = tirx.reinterpret("float32", signed)
    return tirx.Select(level > 0, value, tirx.const(0, "float32")) if variant == "ps" else value
