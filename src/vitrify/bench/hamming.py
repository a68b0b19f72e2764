"""Attention among binary codes alone, C_q (C_k^T V): our op, the plain matrix products of the codes, masked sums.

Both products are the MatAdd of ShiftAddViT's kernel benchmark: sums of the rows of V that a code selects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrify.bench.attention import DTYPES, MAX_ROTATION, ROTATION_BYTES
from vitrify.bench.reference import Kind, check_attention
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.roofline import Cost
from vitrify.errors import InputError
from vitrify.ops import hamming_attention
from vitrify.ops.hamming import pack_bits

SHAPES = ((1, 1, 3136, 32, 16), (1, 2, 784, 32, 16), (1, 5, 196, 32, 16))
SIZES = ("batch_size", "heads", "tokens", "value_dim", "code_dim")
"""What a case names. SHAPES are those of the ShiftAddViT kernel benchmark: PVTv2-B0's first three stages."""


@dataclass(frozen=True)
class Inputs:
    """Codes (batch, heads, tokens, code_dim) of 0 and 1 in the value's dtype and as bits, and values."""

    query: Tensor
    key: Tensor
    query_bits: Tensor
    key_bits: Tensor
    value: Tensor


def prepare(case: Case) -> Prepared:
    """Prepare a case: `batch_size`, `heads`, `tokens`, `value_dim`, `code_dim` (int), `dtype`, `device`, `compile`.

    Raises:
        InputError: a size below 1, or a dtype other than float32, bfloat16 and float16.
    """
    for field in SIZES:
        if case[field] < 1:
            raise InputError(f"{field} must be at least 1, not {case[field]}")
    if case["dtype"] not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {case['dtype']!r}")
    batch, heads, tokens, value_dim, code_dim = (int(case[name]) for name in SIZES)
    dtype, device = DTYPES[case["dtype"]], torch.device(case["device"])

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        drawn = torch.randn(batch, heads, tokens, 2 * code_dim + value_dim, generator=generator, device=device)
        query, key, value = torch.split(drawn.to(dtype), [code_dim, code_dim, value_dim], -1)
        query, key = ((code > 0).to(dtype) for code in (query, key))
        return Inputs(query, key, pack_bits(query), pack_bits(key), value.contiguous())

    contenders = []
    for name, cost in costs(case).items():
        contenders.append(_contender(name, _without_grad(RUNS[name]), cost))
        if case["compile"]:
            compiled = torch.compile(RUNS[name], fullgraph=True, dynamic=False)
            contenders.append(_contender(f"{name} compiled", _without_grad(compiled), cost))
    input_bytes = batch * heads * tokens * (2 * code_dim + value_dim) * dtype.itemsize
    return Prepared(
        inputs=inputs,
        contenders=contenders,
        baselines={c.name: f"matmul{' compiled' if c.name.endswith(' compiled') else ''}" for c in contenders},
        device=device,
        dtype=dtype,
        rotation=min(max(ROTATION_BYTES // input_bytes, 2), MAX_ROTATION),
    )


Run = Callable[[Inputs], Tensor]


def _masked_sum(code: Tensor, rows: Tensor) -> Tensor:
    return torch.where(code.unsqueeze(-1) > 0, rows.unsqueeze(-3), 0).sum(-2, dtype=rows.dtype)


RUNS: dict[str, Run] = {
    "matmul": lambda x: x.query @ (x.key.mT @ x.value),
    "masked sums": lambda x: _masked_sum(x.query, _masked_sum(x.key.mT, x.value)),
    "hamming": lambda x: hamming_attention(x.query, x.key, x.value),
    "hamming bits": lambda x: hamming_attention(x.query_bits, x.key_bits, x.value, code_dim=x.query.shape[-1]),
    # What the codes replace: as many channels, as numbers.
    "SDPA": lambda x: F.scaled_dot_product_attention(x.query, x.key, x.value),
}


def costs(case: Case) -> dict[str, Cost]:
    """Return, by contender, the sums (each counted as the multiply-add it replaces) and the least bytes.

    Codes, as numbers of the case's dtype or as bits, values and results move once.
    """
    batch, heads, tokens, value_dim, code_dim = (int(case[name]) for name in SIZES)
    itemsize = DTYPES[case["dtype"]].itemsize
    sums = 2 * 2 * batch * heads * tokens * code_dim * value_dim
    softmax = 2 * batch * heads * tokens**2 * (code_dim + value_dim)
    values = batch * heads * 2 * tokens * value_dim * itemsize
    as_numbers = values + batch * heads * 2 * tokens * code_dim * itemsize
    as_bits = values + batch * heads * 2 * tokens * -(-code_dim // 8)
    return {
        "matmul": Cost(sums, as_numbers),
        "masked sums": Cost(sums, as_numbers),
        "hamming": Cost(sums, as_numbers),
        "hamming bits": Cost(sums, as_bits),
        "SDPA": Cost(softmax, as_numbers),
    }


def _contender(name: str, run: Run, cost: Cost) -> Contender:
    kind: Kind = "softmax" if name.startswith("SDPA") else "sums"

    def check(x: Inputs) -> Check:
        return check_attention(run(x), x.query, x.key, x.value, scale=x.query.shape[-1] ** -0.5, kind=kind)

    return Contender(name, run, check, cost)


def _without_grad(run: Run) -> Run:
    def call(x: Inputs) -> Tensor:
        with torch.no_grad():
            return run(x)

    return call
