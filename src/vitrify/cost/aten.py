"""Rules for ATen operators: what each appends to the graph. Simple ones are in the tables of `elementwise`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vitrify.cost.builder import Builder
from vitrify.cost.elementwise import ELEMENTWISE, MOVES, REDUCTIONS, WRITES
from vitrify.cost.graph import Operand, Primitive
from vitrify.cost.kernels import attention, chain, normalise, reduce, scale_and_shift, softmax
from vitrify.cost.tensors import accumulator_bits, bits_of, numel


@dataclass(frozen=True)
class Call:
    """A call of an ATen operator: its arguments, the operands that it reads, and its first result."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Operand, ...]
    out: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.out.shape)

    @property
    def bits(self) -> int:
        """Width of the result."""
        return bits_of(self.out)

    def named(self, name: str) -> Any:
        """Return the argument of that name, wherever it stands, or None."""
        names = [argument.name for argument in self.func._schema.arguments]
        return {**dict(zip(names, self.args, strict=False)), **self.kwargs}.get(name)


Rule = Callable[[Builder, Call], Operand | None]


def apply_rule(g: Builder, call: Call) -> Operand | None:
    """Append what the call does and return the operand of its result, or None if no rule knows it."""
    with g.kernel():
        if call.name in RULES:
            return RULES[call.name](g, call)
        if call.name in ELEMENTWISE:
            kinds = ELEMENTWISE[call.name]
            if call.name in ("add", "sub") and call.kwargs.get("alpha", 1) != 1:
                kinds = f"mul {kinds}"
            return chain(g, kinds, call.inputs, call.shape, call.bits)
        if call.name in REDUCTIONS:
            over, after = REDUCTIONS[call.name]
            return reduce(g, over, after, call.inputs, call.shape, call.bits)
        if call.name in MOVES:
            return g.vector("move", call.inputs, call.shape, bits=call.bits)
        if call.name in WRITES:
            source = call.args[WRITES[call.name]]
            elements = source.numel() if isinstance(source, Tensor) else numel(call.shape)
            return g.vector("move", call.inputs, call.shape, elements, bits=call.bits)
    return None


def product(g: Builder, call: Call, left: Operand, right: Operand) -> Operand:
    """A matrix product, (m, k) by (k, n) or batches of them; one of codes with anything only adds."""
    *batch, m, k = left.shape
    n = right.shape[-1]
    sizes, count = (m, k, n), numel(tuple(batch))
    if min(left.bits, right.bits) > 1:
        return g.matmul((left, right), sizes, call.shape, count, out_bits=call.bits)
    if max(left.bits, right.bits) > 1:
        bits = (left.bits, right.bits, accumulator_bits(call.bits))
        return g.matmul((left, right), sizes, call.shape, count, primitive="add", bits=bits, out_bits=call.bits)
    agreement = k.bit_length() + 1  # signed: codes of -1 and +1 may all differ
    bits = (1, 1, agreement)
    return g.matmul((left, right), sizes, call.shape, count, primitive="add", bits=bits, out_bits=agreement)


def _matmul(g: Builder, call: Call) -> Operand:
    return product(g, call, *call.inputs[:2])


def _matvec(g: Builder, call: Call) -> Operand:
    left, right = call.inputs[:2]
    left = left if len(left.shape) > 1 else replace(left, shape=(1, *left.shape))
    return product(g, call, left, replace(right, shape=(*right.shape, 1)))


def _addmm(g: Builder, call: Call) -> Operand:
    bias, left, right = call.inputs[:3]
    beta, alpha = call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)
    out = product(g, call, left, right)
    if alpha != 1:
        out = g.vector("mul", [out], call.shape)
    if beta not in (0, 1):
        bias = g.vector("mul", [bias], bias.shape)
    return g.vector("add", [out, bias], call.shape) if beta else out


def _convolution(g: Builder, call: Call) -> Operand:
    has_bias, transposed, groups = call.args[2] is not None, call.args[6], call.args[8]
    bias = call.inputs[2] if has_bias else None
    return convolution(g, call.inputs[0], call.inputs[1:2], bias, call.shape, groups, transposed=transposed)


def convolution(
    g: Builder,
    x: Operand,
    weights: tuple[Operand, ...],
    bias: Operand | None,
    shape: tuple[int, ...],
    groups: int,
    *,
    transposed: bool = False,
    primitive: Primitive = "multiply",
) -> Operand:
    """A convolution as the matmul that it lowers to; (N, C, spatial...), weights[0] (C_out, C / groups, kernel...).

    Transposed, each input pixel gives a kernel of outputs: m = input pixels, k = channels of a group, n = the rest.
    """
    images, kernel = x.shape[0], numel(weights[0].shape[2:])
    if transposed:
        sizes = images * numel(x.shape[2:]), weights[0].shape[0] // groups, kernel * weights[0].shape[1]
    else:
        sizes = images * numel(shape[2:]), kernel * weights[0].shape[1], weights[0].shape[0] // groups
    inputs = (x, *weights)
    out = g.matmul(inputs, sizes, shape, groups, kind="conv", primitive=primitive, out_bits=x.bits)
    return out if bias is None else g.vector("add", [out, bias], shape)


def _softmax(g: Builder, call: Call) -> Operand:
    return softmax(g, call.inputs[0], call.args[1], call.bits)


def _layer_norm(g: Builder, call: Call) -> Operand:
    x = call.inputs[0]
    rows = (*x.shape[: len(x.shape) - len(call.args[1])], *(1 for _ in call.args[1]))
    return normalise(g, x, rows, call.inputs[1:])


def _rms_norm(g: Builder, call: Call) -> Operand:
    x = call.inputs[0]
    rows = (*x.shape[: len(x.shape) - len(call.args[1])], *(1 for _ in call.args[1]))
    return normalise(g, x, rows, call.inputs[1:], centred=False)


def _group_norm(g: Builder, call: Call) -> Operand:
    x, groups = call.inputs[0], call.args[6]
    return normalise(g, x, (x.shape[0], groups), call.inputs[1:])


def _batch_norm(g: Builder, call: Call) -> Operand:
    """In evaluation its statistics are constants: one product and one sum per element."""
    return scale_and_shift(g, call.inputs[0], call.inputs[1:3])


def _attention(g: Builder, call: Call) -> Operand:
    mask = call.inputs[3] if len(call.inputs) > 3 else None
    query, key, value = call.inputs[:3]
    return attention(g, query, key, value, mask, causal=bool(call.named("is_causal")))


def _gelu(g: Builder, call: Call) -> Operand:
    # 0.5 x (1 + erf(x / sqrt 2)), or 0.5 x (1 + tanh(c (x + 0.044715 x^3))).
    tanh = call.kwargs.get("approximate", "none") == "tanh"
    kinds = "mul mul mul add mul tanh add mul mul" if tanh else "mul erf add mul mul"
    return chain(g, kinds, call.inputs, call.shape, call.bits)


def _pow(g: Builder, call: Call) -> Operand | None:
    kinds = {2: "mul", 3: "mul mul", 4: "mul mul", 0.5: "sqrt", -0.5: "sqrt div", -1: "div"}.get(
        call.args[1] if isinstance(call.args[1], (int, float)) else None  # type: ignore[arg-type]
    )
    return chain(g, kinds, call.inputs, call.shape, call.bits) if kinds else None


def _grid_sample(g: Builder, call: Call) -> Operand:
    """Bilinear: where each point lies and what its four neighbours weigh, then their weighted sum in every channel."""
    image, grid = call.inputs[:2]
    points = grid.shape[:-1]
    # Per coordinate a scale, an offset, a floor, a fraction and its complement; four products and bounds per point.
    places = chain(g, "mul add compare add add", [grid], grid.shape, call.bits)
    weights = g.vector("compare", [g.vector("mul", [places], points, 4 * numel(points))], points, 4 * numel(points))
    return chain(g, "mul " * 4 + "add " * 3, [image, weights], call.shape, call.bits)


def _pool(kinds: str, after: str) -> Rule:
    def rule(g: Builder, call: Call) -> Operand:
        kernel = call.args[1]
        window = numel(tuple(kernel)) if len(kernel) == 2 else kernel[0] ** 2
        out = g.vector(kinds, call.inputs, call.shape, window * numel(call.shape), bits=call.bits)  # type: ignore[arg-type]
        return chain(g, after, [out], call.shape) if after else out

    return rule


RULES: dict[str, Rule] = {
    "_fused_rms_norm": _rms_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_safe_softmax": _softmax,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_softmax": _softmax,
    "addmm": _addmm,
    "avg_pool2d": _pool("add", "div"),
    "baddbmm": _addmm,
    "bmm": _matmul,
    "convolution": _convolution,
    "cudnn_batch_norm": _batch_norm,
    "dot": _matvec,
    "gelu": _gelu,
    "grid_sampler_2d": _grid_sample,
    "max_pool2d_with_indices": _pool("compare", ""),
    "mm": _matmul,
    "mv": _matvec,
    "native_batch_norm": _batch_norm,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "pow": _pow,
}
