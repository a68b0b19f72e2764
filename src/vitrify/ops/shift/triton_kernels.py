"""The GPU kernels of shift layers: decode codes, round tokens, multiply with coded weights, join partial sums.

A weight s 2^(E - top + m) is put together from its code with shifts, masks and two additions, in any format whose
exponent field lies above `MANTISSA` bits of mantissa:

    field = (m + base) << MANTISSA, 0 for "ps" with m = 0;      sign = code << (SIGN - bits + 1)

With base = E - top + 127 that is the weight in bfloat16; with a constant base it is the weight over a power of two of
its channel, in E4M3. Two codes of a byte are decoded at once, in the halves of a 32-bit word. README.md says which
kernels make up a layer, and what is exact.
"""

# Triton's language has no types that mypy could check.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# Its constants are parameters in capitals, which ruff takes for the right side of a comparison.
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(codes, base, BITS: tl.constexpr, PS: tl.constexpr, MANTISSA: tl.constexpr, SIGN: tl.constexpr):
    """Return the bits of weights, uint32; of codes in pairs, the even input's in the low half, the odd one's above.

    codes: uint32 bytes, two codes each up to 4 bits. base: uint32 from 0 to 254, to be added to the level; None is 0.
    """
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    ONES: tl.constexpr = 0x10001 if BITS <= 4 else 1
    if BITS <= 4:
        codes = codes * 0x1001  # the upper half's code is now 16 bits above the lower's, with rubbish between
    level = codes & (TOP * ONES)
    result = (level << MANTISSA) | ((codes << (SIGN - BITS + 1)) & (ONES << SIGN))
    if base is not None:
        if PS:
            # A carry into bit BITS - 1 says that m is not 0; as a factor it lets the base in.
            result += ((level + TOP * ONES) & ((TOP + 1) * ONES)) * (base << (MANTISSA - BITS + 1))
        else:
            result += (base << MANTISSA) * ONES
    return result


@triton.jit
def separate(pairs, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Turn (rows, bytes) words into (rows, inputs) of the unsigned TYPE."""
    if BITS <= 4:
        both = tl.join(pairs.to(TYPE), (pairs >> 16).to(TYPE))
        result = tl.reshape(both, (pairs.shape[0], pairs.shape[1] * 2))
    else:
        result = pairs.to(TYPE)
    return result


@triton.jit
def weights_of(codes, exponent, BITS: tl.constexpr, PS: tl.constexpr, KIND: tl.constexpr):
    """Decode (rows, bytes) codes with exponents (rows,), int32, to (rows, inputs) weights of type KIND.

    E4M3 and int8 hold weights over a power of two of their channel, 2^(E + triton.power_shift(...)). All others hold
    the weights themselves: every one is a bfloat16, and rounded to KIND from float32, as the reference does.
    """
    TOP: tl.constexpr = (1 << (BITS - 1)) - 1
    codes = codes.to(tl.uint32)
    if KIND == tl.float8e4nv:
        # The largest power of 3 and 4 bits is 1, that of 5 bits 2^8: a code of 4 or 5 bits is E4M3's own bits.
        bits = words(codes, 4 if BITS == 3 else None, BITS, PS, 3, 7)
        if not PS and BITS > 3:
            # Level 0, which "q" has, is the subnormal 2^-7 there.
            ONES: tl.constexpr = 0x10001 if BITS == 4 else 1
            some = ((bits >> 3) & (TOP * ONES)) + TOP * ONES
            # Not ~some: with NumPy 2, the interpreter of Triton 3.6 has no inverse of unsigned numbers.
            bits += ((some & ((TOP + 1) * ONES)) ^ ((TOP + 1) * ONES)) >> (BITS - 3)
        result = separate(bits, BITS, tl.uint8).to(tl.float8e4nv, bitcast=True)
    elif KIND == tl.int8:
        codes = separate(codes * 0x1001, BITS, tl.uint16).to(tl.int32)
        size = (1 << (codes & TOP)) >> (1 if PS else 0)
        result = tl.where(codes & (TOP + 1) != 0, -size, size).to(tl.int8)
    else:
        bits = words(codes, (exponent + (127 - TOP)).to(tl.uint32)[:, None], BITS, PS, 7, 15)
        result = separate(bits, BITS, tl.uint16).to(tl.bfloat16, bitcast=True)
        if KIND != tl.bfloat16:
            result = result.to(tl.float32)
            if KIND != tl.float32:
                result = result.to(KIND)
    return result


@triton.jit
def power_of(exponent):
    """Return float32 2^exponent for int32 from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_integer(x):
    """Round float32 numbers to integers, half to even; NaN, whose token's scale is NaN too, to 0."""
    # A sum with 1.5 2^23 has no bits below 1.
    return tl.where(tl.abs(x) < 1e9, (x + 12582912.0) - 12582912.0, 0.0)


@triton.jit
def round_e4m3(x):
    """Round float32 numbers up to 448 to E4M3, half to even; the result is float32."""
    size = tl.abs(x)
    # The sum with this power of two keeps 3 bits below the leading one of x, and none below 2^-9.
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    power = (exponent + (20 << 23)).to(tl.float32, bitcast=True)
    size = (size + power) - power
    return tl.where(x < 0, -size, size)


@triton.jit
def quantize_kernel(
    x, x_stride, values, scales, width, padded,
    LARGEST: tl.constexpr, INTEGER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: `reference.quantize_tokens`. Values are (tokens, padded), 0 beyond `width`."""
    token = tl.program_id(0).to(tl.int64)
    x += token * x_stride
    columns = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        wide = tl.load(x + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
        # As integers, the bits of positive floats have their order, and NaN is above all: a plain maximum drops it.
        largest = tl.maximum(largest, wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    scale = tl.div_rn(tl.max(largest, 0).to(tl.float32, bitcast=True), LARGEST * 1.0)
    scale = tl.where(scale < 1.1754943508222875e-38, 1.0, scale)
    tl.store(scales + token, scale)
    for start in range(0, padded, BLOCK):
        wide = tl.load(x + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
        wide = tl.div_rn(wide, tl.zeros_like(wide) + scale)
        wide = round_integer(wide) if INTEGER else round_e4m3(wide)
        tl.store(values + token * padded + start + columns, wide.to(values.dtype.element_ty), start + columns < padded)


@triton.jit
def decode_kernel(
    codes, codes_stride, exponent, weight, powers, width, padded,
    channels, BITS: tl.constexpr, PS: tl.constexpr, SHIFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per ROWS channels and BLOCK inputs: the weight (channels, padded) as `weights_of` has it.

    Beyond `width` lies what code 0 stands for, a finite number that meets a 0 in the product. `powers`: float32
    (channels,), 2^(E + SHIFT), or None.
    """
    PER_BYTE: tl.constexpr = 2 if BITS <= 4 else 1
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_exists = rows < channels
    power = tl.load(exponent + rows, mask=row_exists, other=0).to(tl.int32)
    bytes = tl.program_id(1) * (BLOCK // PER_BYTE) + tl.arange(0, BLOCK // PER_BYTE)
    inputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers = codes + rows.to(tl.int64)[:, None] * codes_stride + bytes[None, :]
    tile = tl.load(pointers, mask=row_exists[:, None] & (bytes * PER_BYTE < width)[None, :], other=0)
    decoded = weights_of(tile, power, BITS, PS, weight.dtype.element_ty)
    pointers = weight + rows.to(tl.int64)[:, None] * padded + inputs[None, :]
    tl.store(pointers, decoded, mask=row_exists[:, None] & (inputs < padded)[None, :])
    if powers is not None:
        tl.store(powers + rows, power_of(power + SHIFT), mask=row_exists)


@triton.jit
def finished(
    sums, exponent, scales, bias, tokens, token_exists, channels, channel_exists,
    SHIFT: tl.constexpr, POWERS: tl.constexpr,
):  # fmt: skip
    """Return sums (tokens, channels) times 2^(E + SHIFT) and scales, plus bias, in float32, rounded in that order.

    exponent: int8 and bias: by channel; scales: by token. `scales` and `bias` may be None.
    """
    result = sums.to(tl.float32)
    if POWERS:
        power = tl.load(exponent + channels, mask=channel_exists, other=0).to(tl.int32)
        result *= power_of(power + SHIFT)[None, :]
    if scales is not None:
        result *= tl.load(scales + tokens, mask=token_exists, other=0.0)[:, None]
    if bias is not None:
        result += tl.load(bias + channels, mask=channel_exists, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit(do_not_specialize=("tokens", "steps"))
def multiply_kernel(
    x, x_stride, codes, codes_stride, exponent, scales, bias, out, tokens, width, channels, steps,
    BITS: tl.constexpr, PS: tl.constexpr, KIND: tl.constexpr, OPERAND: tl.constexpr,
    POWERS: tl.constexpr, SHIFT: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One program per tile of the output and `steps` BLOCK_IN inputs: out^T = W x^T, the weights decoded in registers.

    x: (tokens, width) of the operands' type, or float32. out: (tokens, channels); if SPLIT (chunks, tokens, channels)
    of float32 or int32, neither scaled nor biased. EVEN: BLOCK_IN divides the width. KIND: the weights' type as
    `weights_of` has it; OPERAND: what the products are made of, the same but in the interpreter.
    """
    PER_BYTE: tl.constexpr = 2 if BITS <= 4 else 1
    tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    rows = (tl.program_id(0) // tiles) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    places = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row_exists, place_exists = rows < channels, places < tokens
    power = tl.load(exponent + rows, mask=row_exists, other=0).to(tl.int32)
    inputs, bytes = tl.arange(0, BLOCK_IN), tl.arange(0, BLOCK_IN // PER_BYTE)
    code_tile = codes + rows.to(tl.int64)[:, None] * codes_stride + bytes[None, :]
    x_tile = x + places[:, None] * x_stride + inputs[None, :]
    sums = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.int32 if OPERAND == tl.int8 else tl.float32)
    begin = tl.program_id(1) * steps * BLOCK_IN
    for start in range(begin, tl.minimum(begin + steps * BLOCK_IN, width), BLOCK_IN):
        code_mask, x_mask = row_exists[:, None], place_exists[:, None]
        if not EVEN:
            code_mask = code_mask & (start + bytes * PER_BYTE < width)[None, :]
            x_mask = x_mask & (start + inputs < width)[None, :]
        tile = tl.load(code_tile + start // PER_BYTE, mask=code_mask, other=0)
        values = tl.load(x_tile + start, mask=x_mask, other=0.0)
        weight = weights_of(tile, power, BITS, PS, KIND)
        if not EVEN and KIND == tl.float16 and not PS:
            # What code 0 stands for beyond the width may be infinite here.
            weight = tl.where((start + inputs < width)[None, :], weight, tl.zeros_like(weight))
        weight = weight.to(OPERAND)
        if x.dtype.element_ty == tl.float32:
            # Three bfloat16 of 8 bits each make up a float32, and so every product is exact.
            for _ in tl.static_range(3):
                piece = (values.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
                sums = tl.dot(weight, tl.trans(piece.to(OPERAND)), sums, input_precision="ieee")
                values = tl.where(values == piece, 0.0, values - piece)  # infinities leave no rest
        elif OPERAND == tl.float8e4nv:
            # A Hopper's sums of E4M3 products keep 14 bits: each step's are added to the float32 ones outside.
            sums += tl.dot(weight, tl.trans(values), max_num_imprecise_acc=BLOCK_IN)
        else:
            sums = tl.dot(weight, tl.trans(values.to(OPERAND)), sums, input_precision="ieee", out_dtype=sums.dtype)
    inside = place_exists[:, None] & row_exists[None, :]
    pointers = out + places[:, None] * channels + rows[None, :]
    sums = tl.trans(sums)
    if SPLIT:
        tl.store(pointers + tl.program_id(1).to(tl.int64) * tokens * channels, sums, mask=inside)
    else:
        result = finished(sums, exponent, scales, bias, places, place_exists, rows, row_exists, SHIFT, POWERS)
        tl.store(pointers, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("tokens", "chunks"))
def combine_kernel(
    partial, exponent, scales, bias, out, tokens, channels, chunks,
    POWERS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token and BLOCK channels: add `chunks` partial sums in their order, then scales and bias."""
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < channels
    pointers = partial + token[:, None] * channels + places[None, :]
    sums = tl.zeros((1, BLOCK), partial.dtype.element_ty)
    for _ in range(chunks):
        sums += tl.load(pointers, mask=inside[None, :], other=0)
        pointers += tokens.to(tl.int64) * channels
    result = finished(sums, exponent, scales, bias, token, token >= 0, places, inside, SHIFT, POWERS)
    tl.store(out + token[:, None] * channels + places[None, :], result.to(out.dtype.element_ty), mask=inside[None, :])
