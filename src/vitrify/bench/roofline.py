"""The floor beside each measurement: no code on this machine can be faster than its bytes and its arithmetic allow."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from vitrify.cost.probe import copy_bytes_s, matmul_flop_s

_TRIES = 8
NARROW = {"int8": "int8", "float8": "float8_e4m3fn"}
"""What a shift layer multiplies in, by its activations; a CPU only rounds to float8, and multiplies in float32."""


@dataclass(frozen=True)
class Cost:
    """What one call has to do at least: operations (a multiply-add is two), and bytes to move.

    `narrow`: how many of `flops` are not in the benchmark's own dtype, by the name of theirs ("bfloat16", "int8").
    """

    flops: int
    bytes_moved: int
    narrow: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Roofline:
    """What this machine reaches in a large copy (GB/s, read plus written) and in large matmuls (GFLOP/s or Gop/s).

    `peak_gflop_s` is the rate in `dtype`, the benchmark's own; `narrow_gflop_s` those in other dtypes, by name.
    """

    bandwidth_gb_s: float
    peak_gflop_s: float
    dtype: str
    narrow_gflop_s: Mapping[str, float] = field(default_factory=dict)

    def floor_ms(self, cost: Cost) -> float:
        """Return the milliseconds that `cost` takes at least: for its bytes or its arithmetic, whichever is slower."""
        arithmetic = (cost.flops - sum(cost.narrow.values())) / self.peak_gflop_s
        arithmetic += sum(flops / self.narrow_gflop_s[name] for name, flops in cost.narrow.items())
        return max(cost.bytes_moved / self.bandwidth_gb_s, arithmetic) * 1e-6

    def best(self, other: Roofline) -> Roofline:
        """Return the higher of both limits: a probe can only be too slow."""
        return Roofline(
            max(self.bandwidth_gb_s, other.bandwidth_gb_s),
            max(self.peak_gflop_s, other.peak_gflop_s),
            self.dtype,
            {name: max(rate, other.narrow_gflop_s[name]) for name, rate in self.narrow_gflop_s.items()},
        )


def probe(device: torch.device, dtype: torch.dtype, narrow: Collection[str] = ()) -> Roofline:
    """Measure the limits in about a second, as the best of a few tries, with the threads torch uses now.

    `narrow`: names of other dtypes whose rate is wanted: bfloat16, float16, int8 or float8_e4m3fn.
    """
    # A CPU copies 128 MiB, far beyond any cache, and multiplies 1,024 rows.
    elements, rows = (None, None) if device.type == "cuda" else (2**25, 1024)

    def gflop_s(dtype: torch.dtype) -> float:
        return matmul_flop_s(device, dtype, rows, _TRIES) / 1e9

    return Roofline(
        bandwidth_gb_s=copy_bytes_s(device, elements, tries=_TRIES) / 1e9,
        peak_gflop_s=gflop_s(dtype),
        dtype=str(dtype).removeprefix("torch."),
        narrow_gflop_s={name: gflop_s(getattr(torch, name)) for name in sorted(narrow)},
    )
