"""A shift layer alone: F.linear, and the shorter multiplications that one would run instead.

Every contender gets the same input and computes a linear layer with bias. "F.linear" multiplies by the decoded weight,
which is as fast as by any other. What rounds its input counts that work in its own time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrify.bench.attention import DTYPES, MAX_ROTATION, ROTATION_BYTES
from vitrify.bench.quantised import RIVALS, Linear
from vitrify.bench.reference import check_linear
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.roofline import NARROW, Cost
from vitrify.errors import InputError
from vitrify.ops import pack_codes, shift_decode, shift_linear, shift_quantize

BITS = 4
ROWS = (1, 64, 197, 1576, 12608, 50432)
# fc1 of the MLPs of ViT-Ti, S, B and L, of PVTv2-B0's stages, and of PVTv2-B1's and B2's; fc2 is the reverse.
MLPS = (
    *((192, 768), (384, 1536), (768, 3072), (1024, 4096)),
    *((32, 256), (64, 512), (160, 640), (256, 1024)),
    *((128, 1024), (320, 1280), (512, 2048)),
)
PUBLISHED = ((3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128))
"""(rows, inputs, outputs) of the ShiftAddViT kernel benchmark."""
FULL = (*((rows, *shape) for a, b in MLPS for shape in ((a, b), (b, a)) for rows in ROWS), *PUBLISHED)
QUICK = ((1, 768, 3072), (197, 768, 3072), (1576, 768, 3072), (197, 3072, 768), (197, 192, 768), *PUBLISHED)


def prepare(case: Case) -> Prepared:
    """Prepare a case: `rows`, `inputs`, `outputs` (int), `dtype`, `device` (str), `compile` (bool).

    Raises:
        InputError: a size below 1, or a dtype other than float32, bfloat16 and float16.
    """
    for field in ("rows", "inputs", "outputs"):
        if case[field] < 1:
            raise InputError(f"{field} must be at least 1, not {case[field]}")
    if case["dtype"] not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {case['dtype']!r}")
    rows, width, out = (int(case[name]) for name in ("rows", "inputs", "outputs"))
    dtype, device = DTYPES[case["dtype"]], torch.device(case["device"])
    generator = torch.Generator(device).manual_seed(0)
    latent = torch.randn(out, width, generator=generator, device=device) / width**0.5
    bias = torch.randn(out, generator=generator, device=device).to(dtype)

    def inputs(seed: int) -> Tensor:
        own = torch.Generator(device).manual_seed(seed)
        return torch.randn(rows, width, generator=own, device=device).to(dtype)

    contenders = []
    not_run = {r.name: why for r in RIVALS if (why := r.objection(rows, width, out, dtype, device)) is not None}
    for name, run, weight, rounding, bits in _layers(latent, bias, not_run):
        least = cost(rounding, bits, case)
        contenders.append(_contender(name, run, weight, bias, rounding, least))
        if case["compile"]:
            compiled = torch.compile(run, fullgraph=True, dynamic=False)
            contenders.append(_contender(f"{name} compiled", compiled, weight, bias, rounding, least))
    return Prepared(
        inputs=inputs,
        contenders=contenders,
        baselines={c.name: f"F.linear{' compiled' if c.name.endswith(' compiled') else ''}" for c in contenders},
        device=device,
        dtype=dtype,
        rotation=min(max(ROTATION_BYTES // (rows * width * dtype.itemsize), 2), MAX_ROTATION),
        not_run=not_run,
    )


def cost(rounding: str, bits: float, case: Case) -> Cost:
    """Return the products (a multiply-add is two operations), in INT8 or E4M3 where inputs are rounded to it.

    Inputs, bias and results move once in the case's dtype, and weights of `bits` bits.
    """
    rows, width, out = (int(case[name]) for name in ("rows", "inputs", "outputs"))
    operations = 2 * rows * width * out
    moved = (rows * (width + out) + out) * DTYPES[case["dtype"]].itemsize + int(bits / 8 * width * out)
    narrow = NARROW.get(rounding)
    return Cost(operations, moved, {narrow: operations} if narrow else {})


def _layers(latent: Tensor, bias: Tensor, not_run: dict[str, str]) -> Iterator[tuple[str, Linear, Tensor, str, float]]:
    """Yield (name, layer, the weight that it stands for, how it rounds its input, bits of a weight in memory).

    Those of `not_run` are left out; a library's that says only when it is asked that it cannot is added to them.
    """
    codes, exponent = shift_quantize(latent, BITS)
    weight, packed = shift_decode(codes, exponent, BITS), pack_codes(codes, BITS)
    plain = weight.to(bias.dtype)
    yield "F.linear", lambda x: F.linear(x, plain, bias), weight, "float", 8 * bias.dtype.itemsize
    # The definition of float8 is no contender on a CPU, which cannot multiply such numbers.
    for kind in ("float", "int8", "float8") if latent.is_cuda else ("float", "int8"):
        yield f"shift {kind}", _shift(packed, exponent, bias, kind), weight, kind, BITS
    for rival in RIVALS:
        if rival.name in not_run:
            continue
        try:
            run, own = rival.make(latent, bias)
        except (RuntimeError, ImportError, ValueError, AssertionError) as error:
            not_run[rival.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        else:
            yield rival.name, run, own, rival.rounding, rival.bits


def _shift(codes: Tensor, exponent: Tensor, bias: Tensor, activations: str) -> Linear:
    return lambda x: shift_linear(x, codes, exponent, bias, bits=BITS, activations=activations)


def _contender(name: str, run: Linear, weight: Tensor, bias: Tensor, rounding: str, cost: Cost) -> Contender:
    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            return run(x)

    def check(x: Tensor) -> Check:
        return check_linear(call(x), x, weight, bias, rounding)

    return Contender(name, call, check, cost)
