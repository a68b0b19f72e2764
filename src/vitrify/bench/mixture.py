"""A mixture of linear layers (multiply and shift) against the layer it was made from, and other ways to run it.

    multiply            the linear layer before conversion, on all tokens: what the mixture has to beat
    mixture             `MixtureLinear` as deployed: packed, in eval mode, router included
    mixture int8        the same, whose shifting expert rounds its tokens to INT8 and adds shifted integers
    mixture float8      the same in E4M3, on GPUs that multiply it
    both and select     both experts on all tokens, then each token's own row: no gather, twice the products
    two matmuls         one gather, product and scatter per expert, by their indices: on a GPU each count is waited for

The router sends exactly the share of the tokens that a case asks for to the multiplying expert, in random places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrify.bench.attention import DTYPES, MAX_ROTATION, ROTATION_BYTES
from vitrify.bench.reference import ROUNDED_TOLERANCE, rounded_tokens, sample_rows
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.roofline import NARROW, Cost
from vitrify.errors import InputError
from vitrify.nn import MixtureLinear, ShiftLinear
from vitrify.ops.experts import dense, route

BITS, VARIANT = 4, "ps"
MULTIPLY, MIXTURE, DENSE, TWO = "multiply", "mixture", "both and select", "two matmuls"
ROUNDED = {f"{MIXTURE} {kind}": kind for kind in NARROW}
"""Mixtures by the activations of their shifting expert."""
Run = Callable[[Tensor], Tensor]

SPLITS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# fc1 of the MLPs of ViT-Ti, S, B and L; fc2 is the reverse.
MLPS = ((192, 768), (384, 1536), (768, 3072), (1024, 4096))
FULL = tuple(
    (rows, *shape, split)
    for inner in MLPS
    for shape in (inner, inner[::-1])
    for rows in (64, 197, 1576, 12608, 50432)
    for split in SPLITS
)
"""(rows, inputs, outputs, multiply)"""
QUICK = (*((1576, 768, 3072, split) for split in SPLITS), (1576, 3072, 768, 0.4), (197, 768, 3072, 0.4))


@dataclass(frozen=True)
class Inputs:
    """Tokens (T, C), and the expert that the router picks for each, int64 (T,)."""

    tokens: Tensor
    index: Tensor


def prepare(case: Case) -> Prepared:
    """Prepare a case.

    Args:
        case: `rows` (tokens), `inputs`, `outputs` (int), `multiply` (float, the share of the tokens that multiply),
            `dtype`, `device` (str), `compile` (bool: also run under torch.compile what it takes whole).

    Raises:
        InputError: a size below 1, a share outside 0 to 1, or a dtype other than float32, bfloat16 and float16.
    """
    for field in ("rows", "inputs", "outputs"):
        if case[field] < 1:
            raise InputError(f"{field} must be at least 1, not {case[field]}")
    if not 0 <= case["multiply"] <= 1:
        raise InputError(f"multiply is a share of the tokens, from 0 to 1, not {case['multiply']}")
    if case["dtype"] not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {case['dtype']!r}")
    dtype, device = DTYPES[case["dtype"]], torch.device(case["device"])
    count, width = int(case["rows"]), int(case["inputs"])
    linear, mixtures = _layers(width, int(case["outputs"]), dtype, device)
    mixture = mixtures[MIXTURE]
    router = [parameter.float() for parameter in (mixture.router.weight, mixture.router.bias)]

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(count, width, generator=generator, device=device)
        places = torch.randperm(count, generator=generator, device=device)
        index = (places >= round(case["multiply"] * count)).long()
        slope = router[0][1] - router[0][0]
        # Along the slope until the second logit is 1 above the first, or 1 below: no rounding turns that around.
        missing = 2 * index - 1 - (F.linear(x, *router) @ x.new_tensor([-1.0, 1.0]))
        return Inputs((x + missing[:, None] * slope / slope.square().sum()).to(dtype), index)

    ways: dict[str, Run] = {MULTIPLY: linear, **mixtures, DENSE: _dense(mixture), TWO: _two(mixture)}
    if case["compile"]:
        for name in (MULTIPLY, *mixtures, DENSE):
            ways[f"{name} compiled"] = torch.compile(ways[name], fullgraph=True, dynamic=False)
    contenders = [
        _contender(name, run, linear, mixtures.get(name.removesuffix(" compiled"), mixture), case)
        for name, run in ways.items()
    ]
    moved = count * (width + int(case["outputs"])) * dtype.itemsize
    return Prepared(
        inputs=inputs,
        contenders=contenders,
        baselines={name: f"{MULTIPLY} compiled" if name.endswith("compiled") else MULTIPLY for name in ways},
        device=device,
        dtype=dtype,
        rotation=min(max(ROTATION_BYTES // moved, 2), MAX_ROTATION),
    )


def cost(name: str, case: Case) -> Cost:
    """Return the products of the linear layers and the router (a multiply-add is two operations), and the least bytes.

    Bytes: tokens and results once, and the weights that are needed, 4 bits each where they are shifts.
    """
    tokens, width, outputs = (int(case[field]) for field in ("rows", "inputs", "outputs"))
    itemsize = DTYPES[case["dtype"]].itemsize
    kind = name.removesuffix(" compiled")
    both = kind == DENSE
    layers = tokens * width * outputs * (2 if both else 1)
    shifted = 2 * (tokens - round(case["multiply"] * tokens)) * width * outputs
    router = 0 if kind == MULTIPLY else 2 * tokens * width
    weights = 0
    if kind == MULTIPLY or both or case["multiply"] > 0:
        weights += width * outputs * itemsize
    if kind != MULTIPLY and (both or case["multiply"] < 1):
        weights += width * outputs * BITS // 8
    moved = tokens * (width + outputs) * itemsize + weights
    return Cost(2 * (layers + router), moved, {NARROW[ROUNDED[kind]]: shifted} if kind in ROUNDED else {})


def _layers(
    width: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Linear, dict[str, MixtureLinear]]:
    """Return a linear layer with random weights, and packed mixtures made from it by name."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(*size, generator=generator) / width**0.5 for size in ((outputs, width), (outputs,))]

    def layer() -> nn.Linear:
        made = nn.Linear(width, outputs)
        with torch.no_grad():
            for parameter, value in zip(made.parameters(), values, strict=True):
                parameter.copy_(value)
        return made.eval().requires_grad_(False).to(device, dtype)

    mixtures = {}
    for name, activations in {MIXTURE: "float", **ROUNDED}.items():
        if activations != "float8" or _has_e4m3(device):
            mixture = MixtureLinear.adopt_(layer(), bits=BITS, variant=VARIANT, activations=activations)
            mixture.eval().requires_grad_(False).pack_()
            mixtures[name] = mixture
    return layer(), mixtures


def _has_e4m3(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _dense(mixture: MixtureLinear) -> Run:
    experts = list(mixture.experts().values())

    def run(x: Tensor) -> Tensor:
        return dense(x, route(mixture.router(x))[0], experts)

    return run


def _two(mixture: MixtureLinear) -> Run:
    experts = list(mixture.experts().values())

    def run(x: Tensor) -> Tensor:
        index = mixture.router(x).argmax(-1)
        out = x.new_empty(len(x), mixture.out_features)
        for number, expert in enumerate(experts):
            rows = (index == number).nonzero()[:, 0]
            out.index_copy_(0, rows, expert(x.index_select(0, rows)))
        return out

    return run


def _contender(name: str, way: Run, linear: nn.Linear, mixture: MixtureLinear, case: Case) -> Contender:
    def run(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return way(inputs.tokens)

    def check(inputs: Inputs) -> Check:
        return check_rows(run(inputs), inputs, linear, None if name.startswith(MULTIPLY) else mixture)

    return Contender(name, run, check, cost(name, case), "loop" if name == TWO else "graph")


@torch.no_grad()
def check_rows(output: Tensor, inputs: Inputs, linear: nn.Linear, mixture: MixtureLinear | None) -> Check:
    """Compare sampled rows with float64: of the multiplying layer, or each of the expert that its token belongs to.

    The allowed error is twice that of plain PyTorch in the inputs' dtype on the same rows, plus an epsilon band. Any
    NaN or infinity in the whole output fails.
    """
    rows = sample_rows(len(output), output.device)
    x, index = inputs.tokens[rows], inputs.index[rows]
    shift = None if mixture is None else cast("ShiftLinear", mixture.shift)
    rounding = "float" if shift is None else shift.activations
    second = linear.weight if shift is None else shift.decoded_weight()

    def evaluate(dtype: torch.dtype, rounding: str) -> Tensor:
        bias = linear.bias.to(dtype)
        first = F.linear(x.to(dtype), linear.weight.to(dtype), bias)
        other = F.linear(rounded_tokens(x, rounding).to(dtype), second.to(dtype), bias)
        return torch.where(index[:, None] == 0, first, other).double()

    exact = evaluate(torch.float64, rounding)
    largest = exact.abs().max().item()
    lost = (evaluate(x.dtype, "float") - evaluate(torch.float64, "float")).abs().max().item()
    tolerance = 2 * lost / largest + 8 * torch.finfo(x.dtype).eps + ROUNDED_TOLERANCE.get(rounding, 0)
    error = (output[rows].double() - exact).abs().max().item() / largest
    what = "the linear layer" if mixture is None else "each token's expert"
    return Check(
        error if bool(output.isfinite().all()) else float("nan"),
        tolerance,
        f"float64 {what}, {len(rows)} of {len(output)} rows",
    )
