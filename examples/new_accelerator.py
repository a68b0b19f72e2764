"""A new accelerator is a description and, if need be, a schedule: one with an array of its own for Taylor attention.

    python examples/new_accelerator.py

The second array computes K^T V of one head while the first one still computes Q (K^T V) of the head before.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import timm

import vitrify
from vitrify.accelerator.placement import Placement
from vitrify.accelerator.schedules import place, schedule

DESCRIPTION = """
title: two arrays, one of them for K^T V
clock_mhz: 500
node_nm: 28
schedule: two-arrays
numbers: {activation_bits: 8, weight_bits: 8, partial_bits: 24, vector_bits: 16}
engines:
  main: {kind: systolic, rows: 64, columns: 64}
  context: {kind: systolic, rows: 64, columns: 16, dataflows: [output]}
  lanes: {kind: lanes, lanes: 64, does: [mul, add, compare, div, sqrt, erf, exp], latency: 16}
sram_kib: 200
dram: {gb_per_s: 76.8, latency_ns: 50, energy: ddr4}
standing:
  assumed: [clock_mhz, node_nm, numbers, engines, sram_kib, dram]
"""


@schedule("two-arrays")
def two_arrays(workload, hardware, masks):
    """Place K^T V on the array "context", and everything else where it fits."""
    return [
        Placement(operation, "context")
        if operation.kind == "matmul" and operation.step == "M"
        else place(operation, hardware)
        for operation in workload.operations
    ]


def main() -> None:
    """Compare it with the main array alone, on DeiT-Tiny with Taylor attention."""
    model = timm.create_model("deit_tiny_patch16_224")
    vitrify.convert_(model, vitrify.recipes.vitality())
    workload = vitrify.workload(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two_arrays.yaml"
        path.write_text(DESCRIPTION)
        two = vitrify.simulate(workload, path)
    one = vitrify.simulate(workload, "systolic")
    print(two, one, sep="\n\n")
    attention, whole = one.attention_cycles / two.attention_cycles, one.cycles / two.cycles
    print(f"\nattention {attention:.2f}x, all {whole:.3f}x as fast, for {two.total_mm2 / one.total_mm2:.2f}x the area")


if __name__ == "__main__":
    main()
