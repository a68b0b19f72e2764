"""What simple ATen operators consist of, by name without a trailing underscore: the tables that `aten` reads.

Each kind counts once per element. `sign`, `abs` and selections count as a comparison; a constant factor as a product.
"""

from __future__ import annotations

# Over the elements of the output.
ELEMENTWISE: dict[str, str] = {
    "abs": "compare",
    "add": "add",
    "addcdiv": "div mul add",
    "addcmul": "mul mul add",
    "bitwise_and": "compare",
    "bitwise_not": "compare",
    "bitwise_or": "compare",
    "ceil": "compare",
    "clamp": "compare compare",
    "clamp_max": "compare",
    "clamp_min": "compare",
    "cos": "exp",  # as sin: a polynomial after a reduction of the range, as exp is
    "div": "div",
    "elu": "exp add compare",
    "eq": "compare",
    "erf": "erf",
    "exp": "exp",
    "expm1": "exp add",
    "floor": "compare",
    "ge": "compare",
    "gt": "compare",
    "hardsigmoid": "add compare compare mul",
    "hardswish": "add compare compare mul mul",
    "hardtanh": "compare compare",
    "le": "compare",
    "leaky_relu": "mul compare",
    "lerp": "add mul add",
    "logical_and": "compare",
    "logical_not": "compare",
    "logical_or": "compare",
    "lt": "compare",
    "masked_fill": "compare",
    "maximum": "compare",
    "minimum": "compare",
    "mul": "mul",
    "ne": "compare",
    "neg": "add",
    "reciprocal": "div",
    "relu": "compare",
    "round": "compare",
    "rsqrt": "sqrt div",
    "rsub": "add",
    "sigmoid": "exp add div",
    "sign": "compare",
    "sin": "exp",
    "silu": "exp add div",
    "sqrt": "sqrt",
    "square": "mul",
    "sub": "add",
    "tanh": "tanh",
    "threshold": "compare",
    "where": "compare",
    # Interpolation: 4 or 16 neighbours of each output, weighted and summed.
    "upsample_bicubic2d": "mul " * 20 + "add " * 15,
    "upsample_bilinear2d": "mul " * 4 + "add " * 3,
}

# Over the elements of the input, and then over those of the output.
REDUCTIONS: dict[str, tuple[str, str]] = {
    "_adaptive_avg_pool2d": ("add", "div"),
    "all": ("compare", ""),
    "amax": ("compare", ""),
    "amin": ("compare", ""),
    "any": ("compare", ""),
    "argmax": ("compare", ""),
    "argmin": ("compare", ""),
    "col2im": ("add", ""),  # overlapping windows sum
    "count_nonzero": ("compare add", ""),
    "cumsum": ("add", ""),
    "linalg_vector_norm": ("mul add", "sqrt"),
    "max": ("compare", ""),
    "mean": ("add", "div"),
    "min": ("compare", ""),
    "sum": ("add", ""),
    "var": ("add add mul add", "div"),
}

# Data that is really rearranged or converted: as many elements as the output has.
MOVES: frozenset[str] = frozenset(
    (
        *("_to_copy", "bucketize", "cat", "channel_shuffle", "clone", "constant_pad_nd", "embedding", "flip", "gather"),
        *("im2col", "index", "index_select", "pixel_shuffle", "pixel_unshuffle", "reflection_pad2d", "repeat"),
        *("replication_pad2d", "roll", "stack", "tril", "triu", "upsample_nearest2d"),
    )
)

# Written into the first argument, which is there already: as many elements as the source has.
WRITES: dict[str, int] = {"copy": 1, "index_put": 2, "scatter": 3, "select_scatter": 1, "slice_scatter": 1}

# Tensors of the shape of others, made without looking at their values.
FACTORIES: frozenset[str] = frozenset(
    (
        *("empty_like", "fill", "full_like", "lift_fresh", "new_empty", "new_empty_strided", "new_full", "new_ones"),
        *("new_zeros", "ones_like", "zero", "zeros_like"),
    )
)

# In-place, and yet nothing is written: they change how memory is read.
VIEWS: frozenset[str] = frozenset(("as_strided_", "squeeze_", "swapaxes_", "t_", "transpose_", "unsqueeze_"))
