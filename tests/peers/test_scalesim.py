"""SCALE-Sim reads our topology: run on an exported model, its cycles are those of its closed form for each product.

Needs `pip install scalesim "numpy<2.3"`; skipped without.
"""

from __future__ import annotations

import csv
from math import ceil

import pytest
from timm.models.vision_transformer import VisionTransformer

import vitrify
from vitrify.cost.export import to_scalesim

scale_sim = pytest.importorskip("scalesim.scale_sim", reason="scalesim is not installed")

SIDE = 8
CONFIG = f"""
[general]
run_name = exported
[architecture_presets]
ArrayHeight: {SIDE}
ArrayWidth: {SIDE}
IfmapSramSzkB: 64
FilterSramSzkB: 64
OfmapSramSzkB: 64
IfmapOffset: 0
FilterOffset: 10000000
OfmapOffset: 20000000
Dataflow: os
ReadRequestBuffer: 32
WriteRequestBuffer: 32
[layout]
IfmapCustomLayout: False
IfmapSRAMBankBandwidth: 10
IfmapSRAMBankNum: 10
IfmapSRAMBankPort: 2
FilterCustomLayout: False
FilterSRAMBankBandwidth: 10
FilterSRAMBankNum: 10
FilterSRAMBankPort: 2
[sparsity]
SparsitySupport: false
[run_presets]
InterfaceBandwidth: CALC
UseRamulatorTrace: False
"""


def output_stationary(m: int, k: int, n: int) -> int:
    """Cycles of an M x K by K x N product; the last one is SCALE-Sim's own off-by-one."""
    return ceil(m / SIDE) * ceil(n / SIDE) * (k + 2 * SIDE - 2) - 1


@pytest.mark.parametrize("recipe", [None, "shiftaddvit"])
def test_it_simulates_every_product_of_an_exported_model(recipe, tmp_path):
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=4)
    if recipe is not None:
        vitrify.convert_(model, vitrify.recipes.get(recipe))
    graph = vitrify.workload(model, (3, 32, 32))
    files = {"config.cfg": CONFIG, "topology.csv": to_scalesim(graph), "layout.csv": "Layer,\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    simulator = scale_sim.scalesim(
        save_disk_space=True,
        verbose=False,
        config=str(tmp_path / "config.cfg"),
        topology=str(tmp_path / "topology.csv"),
        layout=str(tmp_path / "layout.csv"),
        input_type_gemm=True,
    )
    simulator.run_scale(top_path=str(tmp_path))

    expected = [
        output_stationary(op.m, op.k, op.n) for op in graph.operations if op.kind != "vector" for _ in range(op.count)
    ]
    with (tmp_path / "exported" / "COMPUTE_REPORT.csv").open() as file:
        rows = [{key.strip(): value for key, value in row.items() if key} for row in csv.DictReader(file)]
    assert [int(float(row["Total Cycles"])) for row in rows] == expected  # enough bandwidth: none of them stalls
