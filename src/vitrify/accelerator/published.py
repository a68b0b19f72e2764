"""The public simulators of Sanger and ViTCoD as they were published, faults included: to reproduce their figures.

Nothing here is a model of the hardware; `simulate` has those. Facts read in hatsu3/Sanger (`bench_sanger.py`,
`modeling_sanger_spattn.py`) and GATECH-EIC/ViTCoD (`Hardware/Simulator`), both at their last commit; code our own.

What Sanger's leaves out or gets wrong:
- The dense output projection is divided by the density, as if its weights were attention.
- The 4-bit predictor, packing, the exponents and divisions, DRAM, the array's fill and drain: all free.
- Attention only: no MLP, no normalisation. The width is 768 whatever the model.
- The load balance counts idle PEs within a sub-row, and not those of a last pass with too few sub-rows. Its variant
  without skipping adds the number of *occupied* tiles where the empty ones belong.

What ViTCoD's leaves out or gets wrong:
- Attention runs on 64 x 64 = 4096 MACs a cycle, the projections and the MLP on 64 x 8 = 512.
- Of each layer it simulates head 0 and takes the others to be equal, the array's columns divided among the heads and
  rounded down: with 3 heads 2 of 512 PEs never work.
- No softmax, no normalisation, no indices of the sparse part, no energy; a buffer too small prints a line.
- Loads, codes and products overlap perfectly over the whole network: only the largest of the sums counts. At 95 %
  sparsity on DeiT-Tiny that is the loads, 4 n + 3 cycles a layer with at least one global token, whatever the mask.
- The MLP is taken to be four times as wide as the tokens; below 512 tokens its weights are never loaded.
- A layer whose head 0 has no global token, or no other, divides by zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitrify.accelerator.packing import Mask, sub_rows
from vitrify.cost.graph import Workload
from vitrify.errors import InputError, UnsupportedError

SANGER_OPS_PER_S = 64 * 16 * 2 * 1e9
"""64 x 16 PEs at 1 GHz, two operations each."""

VITCOD_CLOCK_HZ = 500e6
VITCOD_PES = 64 * 8
VITCOD_ATTENTION_PES = 64 * 64
VITCOD_COLUMNS = 64
VITCOD_BITS_PER_S = 76.8 * 1024**3 * 8
VITCOD_RATIO = 2 / 3
"""Heads left of each query and key by ViTCoD's encoder, for 3 heads."""


def sanger_layer(tokens: int, density: float, load_balance: float, width: int = 768) -> float:
    """Return the ms of one attention layer with its projections, as Sanger's simulator has it.

    density and load_balance are shares above 0, of kept entries and of busy PEs; raises InputError for others.

    >>> round(sanger_layer(512, 0.25, 0.8), 3)
    1.1
    """
    for name, share in (("density", density), ("load_balance", load_balance)):
        if not 0 < share <= 1:
            raise InputError(f"{name} must be above 0 and at most 1, not {share}")
    projections = 3 * 2 * tokens * width**2
    attention = 2 * 2 * tokens**2 * width
    output_projection = 2 * tokens * width**2
    slowed = (attention + output_projection) * density / load_balance
    return 1e3 * (projections + slowed) / SANGER_OPS_PER_S


def sanger_load_balance(mask: Mask, pes: int = 16, ports: int = 64) -> float:
    """Return the load balance that Sanger's code measures on a mask ("skip"): kept entries by PEs of all sub-rows.

    Raises InputError where the keys are no multiple of `ports`, which that code asserts, and for an empty mask.
    """
    if mask.shape[-1] % ports:
        raise InputError(f"Sanger's code needs keys in multiples of {ports}, not {mask.shape[-1]}")
    rows = int(sub_rows(mask, pes, ports).sum())
    if not rows:
        raise InputError("a mask that keeps nothing has no load balance")
    return int(mask.sum()) / (rows * pes)


@dataclass(frozen=True)
class VitcodCycles:
    """Cycles at 500 MHz that ViTCoD's simulator adds up; it takes them to overlap, but codes and products.

    compute, codes, loads   of the products, of encoding or decoding queries and keys, of moving data
    """

    compute: int
    codes: int
    loads: int

    @property
    def total(self) -> int:
        """What it reports."""
        return max(self.compute + self.codes, self.loads)


@dataclass(frozen=True)
class _Layer:
    tokens: int
    width: int
    heads: int
    head_dim: int


def vitcod_ffn_cycles(graph: Workload) -> VitcodCycles:
    """Return the cycles of all MLPs of a ViT: its MACs / 512, rounded down for each of the two layers.

    For a DeiT-Tiny the total is 1,361,664. Raises as `vitcod_attention_cycles` does.
    """
    compute = loads = 0
    for layer in _layers(graph):
        compute += 2 * (layer.tokens * layer.width * layer.width * 4 // VITCOD_PES)
        passes = layer.tokens // VITCOD_PES
        loads += passes * layer.width * (4 * _moved(layer.width) + _moved(4 * layer.width))
    return VitcodCycles(compute, 0, loads)


def vitcod_linear_cycles(graph: Workload) -> VitcodCycles:
    """Return the cycles of all projections of a ViT's attention, with the encoding of queries and keys.

    For a DeiT-Tiny the total is 681,492, not the 680,832 of MACs / 512: each of 3 heads has 512 // 3 = 170 PEs, on
    which a token's 192 x 64 products take 72.3 cycles, rounded down to 72, for queries, keys and values; the output
    projection, rounded down once a layer, takes 14,239. Raises as `vitcod_attention_cycles` does.
    """
    compute = codes = loads = 0
    for layer in _layers(graph):
        heads, width, kept_heads = layer.heads, layer.width, layer.heads * VITCOD_RATIO
        pes = int(VITCOD_PES / heads)
        compute += 3 * layer.tokens * (width * layer.head_dim // pes) + layer.tokens * width * layer.head_dim // pes
        codes += 2 * layer.tokens * (heads * layer.head_dim // int(VITCOD_PES / kept_heads))
        loads += 3 * layer.head_dim * _moved(heads * width) + 2 * _moved(heads, 1 / kept_heads)
        loads += layer.tokens * (2 * _moved(layer.head_dim, 1 / kept_heads) + _moved(layer.head_dim, 1 / heads))
        loads += layer.tokens // pes * width * _moved(layer.head_dim, 1 / heads)
    return VitcodCycles(compute, codes, loads)


def vitcod_attention_cycles(graph: Workload, first_heads: Sequence[tuple[int, int]]) -> VitcodCycles:
    """Return the cycles of Q K^T and A V of a ViT under masks.

    first_heads   of head 0 of each layer: its global tokens, and the entries kept outside their columns
                  (`packing.polarise`)
    For a DeiT-Tiny at 95 % sparsity the total is 9,492. Raises UnsupportedError for a workload that is no plain ViT of
    one image with softmax attention, InputError for another number of layers and where the original divides by zero.
    """
    layers = _layers(graph)
    if len(first_heads) != len(layers):
        raise InputError(f"the workload has {len(layers)} attention layers, but {len(first_heads)} masks are given")
    compute = codes = loads = 0
    for index, (layer, (dense, rest)) in enumerate(zip(layers, first_heads, strict=True)):
        n, heads, width = layer.tokens, layer.heads, layer.head_dim
        columns = int(VITCOD_COLUMNS * (dense * n / (rest + dense * n))) if dense else 0
        if not 0 < columns < VITCOD_COLUMNS:
            raise InputError(f"ViTCoD's simulator divides by zero in layer {index}: {dense} global tokens, {rest} kept")
        code = heads * VITCOD_RATIO * width
        per_code = math.ceil(code / int(VITCOD_ATTENTION_PES / heads))
        row, weights = _moved(code), _moved(heads * VITCOD_RATIO, 1 / heads)
        codes += 2 * n * per_code
        loads += 2 * n * row + (3 if dense < n else 2) * weights + n * _moved(heads * width)
        rest_columns = VITCOD_COLUMNS - columns
        steps = math.ceil(width / (VITCOD_COLUMNS / heads))
        compute += steps * max(dense * math.ceil(n / columns), math.ceil(rest / rest_columns))
        compute += max(
            math.ceil(n * width * dense / int(columns * VITCOD_COLUMNS / heads)),
            math.ceil(rest * width / int(rest_columns * VITCOD_COLUMNS / heads)),
        )
    return VitcodCycles(compute, codes, loads)


def _moved(size: float, share: float = 1) -> int:
    """Return the cycles of moving so many bytes over that share of the bandwidth."""
    return math.ceil(size * 8 / (VITCOD_BITS_PER_S * share) * VITCOD_CLOCK_HZ)


def _layers(graph: Workload) -> list[_Layer]:
    if graph.input_shape[0] != 1:
        raise UnsupportedError(f"ViTCoD's simulator knows one image, not a batch of {graph.input_shape[0]}")
    scores = {op.module: op for op in graph.operations if op.step == "qk" and op.macs}
    if not scores:
        raise UnsupportedError(f"{graph.model} has no softmax attention, and ViTCoD's simulator knows no other")
    found = []
    for module, score in scores.items():
        widths = {op.k for op in graph.operations if op.kind == "matmul" and op.module.startswith(f"{module}.")}
        if widths != {score.count * score.k} or score.m != score.n:
            raise UnsupportedError(f"{module} is no plain self-attention: ViTCoD's simulator knows no other")
        found.append(_Layer(score.m, score.count * score.k, score.count, score.k))
    return found
