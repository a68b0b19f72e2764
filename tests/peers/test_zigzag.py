"""ZigZag reads our workload: run on an exported model, it finds every product, its operands and their widths.

Needs `pip install zigzag-dse six`; skipped without.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from timm.models.vision_transformer import VisionTransformer

import vitrify
from vitrify.cost.export import to_zigzag

zigzag = pytest.importorskip("zigzag", reason="zigzag-dse is not installed")
api = pytest.importorskip("zigzag.api", reason="zigzag-dse is not installed")

INPUTS = Path(zigzag.__file__).parent / "inputs"
SIDE = 4


def machine(folder: Path) -> Path:
    """Write ZigZag's TPU with registers of 32 bits: its own hold 8 and 16, and wider operands fit no register.

    With few PEs, as ZigZag cannot print layers that need only one step.
    """
    data = yaml.safe_load((INPUTS / "hardware" / "tpu_like.yaml").read_text())
    for name in ("rf_128B", "rf_2B"):
        memory = data["memories"][name]
        memory["size"] = max(memory["size"], 32)
        for port in memory["ports"]:
            port["bandwidth_min"] = port["bandwidth_max"] = 32
    data["operational_array"]["sizes"] = [SIDE, SIDE]
    path = folder / "tpu.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def mapping(folder: Path) -> Path:
    """Write the weight-stationary mapping of that machine."""
    links = {"O": "O", "W": "I2", "I": "I1"}
    unrolled = {"D1": [f"K, {SIDE}"], "D2": [f"C, {SIDE}"]}
    path = folder / "mapping.yaml"
    path.write_text(yaml.safe_dump([{"name": "default", "spatial_mapping": unrolled, "memory_operand_links": links}]))
    return path


@pytest.mark.parametrize("recipe", [None, "shiftaddvit"])
def test_it_costs_every_product_of_an_exported_model(recipe, tmp_path):
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=4)
    if recipe is not None:
        vitrify.convert_(model, vitrify.recipes.get(recipe))
    graph = vitrify.workload(model, (3, 32, 32))
    (tmp_path / "workload.yaml").write_text(to_zigzag(graph))

    energy, latency, results = api.get_hardware_performance_zigzag(
        str(tmp_path / "workload.yaml"),
        str(machine(tmp_path)),
        str(mapping(tmp_path)),
        opt="energy",
        dump_folder=str(tmp_path / "out"),
        lpf_limit=6,
        loma_show_progress_bar=False,
    )

    # In an order of its own, in which operands come before what reads them.
    layers = {cost.layer.name: cost.layer for cost, _ in results[0][1]}
    products = [op for op in graph.operations if op.kind != "vector"]
    assert len(layers) == len(products)
    assert energy > 0
    assert latency >= graph.macs / SIDE**2
    for op in products:
        (layer,) = [layer for name, layer in layers.items() if name.split("_")[0] == op.id]
        assert layer.total_mac_count == op.macs
        widths = {str(operand): bits for operand, bits in layer.operand_precision.data.items()}
        assert (widths["I"], widths["W"], widths["O"]) == op.bits
