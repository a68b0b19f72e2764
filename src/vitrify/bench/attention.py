"""The attention core alone: PyTorch's fused softmax attention (SDPA) against Taylor attention, at equal inputs.

Both are timed on contiguous (batch, heads, tokens, head_dim) tensors and, since no model produces those, on the strides
that timm's packed projection leaves behind: views of one (batch, tokens, 3, heads, head_dim) tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrify.bench.reference import Kind, check_attention
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.roofline import Cost
from vitrify.errors import InputError
from vitrify.ops import taylor_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROTATION_BYTES = 2**28
"""Rotate through about this much input, so that a fast contender does not read its input from cache..."""
MAX_ROTATION = 4
"""... but through at most this many inputs, as a small input is in cache in a real model, too."""


@dataclass(frozen=True)
class Inputs:
    """The same values twice: each (batch, heads, tokens, head_dim), contiguous, and as views of a packed projection."""

    contiguous: tuple[Tensor, Tensor, Tensor]
    packed: tuple[Tensor, Tensor, Tensor]


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def prepare(case: Case) -> Prepared:
    """Prepare a case: `tokens`, `heads`, `head_dim`, `batch_size` (int), `dtype`, `device` (str), `compile` (bool).

    Raises:
        InputError: a size below 1, or a dtype other than float32, bfloat16 and float16.
    """
    for field in ("tokens", "heads", "head_dim", "batch_size"):
        if case[field] < 1:
            raise InputError(f"{field} must be at least 1, not {case[field]}")
    if case["dtype"] not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {case['dtype']!r}")
    batch, tokens, heads, width = (int(case[name]) for name in ("batch_size", "tokens", "heads", "head_dim"))
    dtype, device = DTYPES[case["dtype"]], torch.device(case["device"])

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        packed = torch.randn(batch, tokens, 3, heads, width, generator=generator, device=device).to(dtype)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return Inputs((query.contiguous(), key.contiguous(), value.contiguous()), (query, key, value))

    contenders: list[Contender] = []
    for suffix, wrap in (("", _eager), (" compiled", _compiled)) if case["compile"] else (("", _eager),):
        for layout in ("", " packed"):
            contenders.append(_contender(f"SDPA{layout}{suffix}", wrap(F.scaled_dot_product_attention), layout, case))
            contenders.append(_contender(f"Taylor{layout}{suffix}", wrap(taylor_attention), layout, case))
    input_bytes = batch * tokens * 3 * heads * width * dtype.itemsize * 2
    return Prepared(
        inputs=inputs,
        contenders=contenders,
        baselines={c.name: c.name.replace("Taylor", "SDPA") for c in contenders},
        device=device,
        dtype=dtype,
        rotation=min(max(ROTATION_BYTES // input_bytes, 2), MAX_ROTATION),
    )


def cost(kind: Kind, case: Case) -> Cost:
    """Return the products (docs/papers.md 2; a multiply-add is two operations); Q, K, V and the result move once."""
    batch, n, heads, d = (int(case[name]) for name in ("batch_size", "tokens", "heads", "head_dim"))
    multiplications = 2 * n * n * d if kind == "softmax" else 2 * n * d * d + d * d
    itemsize = DTYPES[case["dtype"]].itemsize
    return Cost(flops=2 * batch * heads * multiplications, bytes_moved=4 * batch * heads * n * d * itemsize)


def _contender(name: str, attend: Attend, layout: str, case: Case) -> Contender:
    kind: Kind = "taylor" if name.startswith("Taylor") else "softmax"

    def run(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return attend(*(inputs.packed if layout else inputs.contiguous))

    def check(inputs: Inputs) -> Check:
        query, key, value = inputs.contiguous
        return check_attention(run(inputs), query, key, value, scale=query.shape[-1] ** -0.5, kind=kind)

    return Contender(name, run, check, cost(kind, case))


def _eager(attend: Attend) -> Attend:
    return attend


def _compiled(attend: Attend) -> Attend:
    return torch.compile(attend, fullgraph=True, dynamic=False)
