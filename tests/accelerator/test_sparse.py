"""Sanger and ViTCoD: what masks keep is what is computed, and the predictor is charged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import vitrify
from vitrify.accelerator.hardware import load
from vitrify.accelerator.masks import LayerMask, Masks, synthetic_for
from vitrify.accelerator.packing import packed_rounds, polarise
from vitrify.accelerator.simulate import simulate
from vitrify.artefact import create_model
from vitrify.errors import InputError


@pytest.fixture(scope="module")
def graph():
    return vitrify.workload(create_model("vit_mini_patch2_28", num_classes=10), (1, 28, 28))


def attention_macs(graph):
    return sum(operation.macs for operation in graph.operations if operation.step in ("qk", "av"))


def test_sanger_computes_what_is_kept_in_passes_over_the_packed_mask(graph):
    masks = synthetic_for(graph, 0.2)
    result = simulate(graph, "sanger", masks=masks)
    dense = graph.macs - attention_macs(graph)
    assert result.macs["array"] == pytest.approx(dense + 0.2 * attention_macs(graph), rel=0.01)
    layer = masks["blocks.0.attn"]
    qk = next(o for o in graph.operations if o.step == "qk" and o.kind == "matmul" and o.module == "blocks.0.attn")
    rounds = sum(packed_rounds(head, 64, 16) for head in layer.kept[0])
    jobs = [j for j in result.jobs if result.placements[j.operation].operation.id == qk.id and j.resource == "array"]
    assert sum(job.work for job in jobs) == rounds * qk.k


def test_the_predictor_and_its_threshold_are_charged(graph):
    result = simulate(graph, "sanger", masks=synthetic_for(graph, 0.2))
    scores = sum(o.macs for o in graph.operations if o.step == "qk")
    assert result.macs["predictor"] == pytest.approx(scores)
    steps = {o.id: o for o in result.operations if o.step == "predict"}
    assert all(cost.pj > 0 for cost in steps.values())
    assert result.energy_pj["packer"] > 0


def test_denser_masks_keep_the_array_longer(graph):
    busy = []
    for density in (0.05, 0.3, 1.0):
        result = simulate(graph, "sanger", masks=synthetic_for(graph, density))
        busy.append(sum(o.busy for o in result.operations if o.step in ("qk", "av") and o.engine == "array"))
    assert busy[0] < busy[1] < busy[2]


def test_vitcod_computes_global_tokens_in_full_and_the_rest_by_entry(graph):
    masks = synthetic_for(graph, 0.1)
    result = simulate(graph, "vitcod", masks=masks)
    ids = {o.id: o for o in graph.operations if o.step == "qk" and o.kind == "matmul"}
    for identity, operation in ids.items():
        jobs = [j for j in result.jobs if result.placements[j.operation].operation.id == identity and j.tile]
        work = sum(job.work for job in jobs if job.resource == "array")
        expected = 0
        for head in masks[operation.module].kept[0]:
            split = polarise(head)
            expected += -(-int(split.denser + split.sparser) * operation.k // 512)
        assert work == expected


def test_without_masks_they_are_synthetic_and_the_result_says_so(graph):
    assert any("synthetic" in note and "0.25" in note for note in simulate(graph, "sanger").notes)
    assert any("density 0.1" in note for note in simulate(graph, "vitcod").notes)
    assert not simulate(graph, "systolic").notes


def test_masks_of_another_model_are_refused_by_name(graph):
    masks = Masks({"other.attn": LayerMask.of(np.ones((1, 2, 196, 196), bool))}, "synthetic: test")
    with pytest.raises(InputError, match=r"blocks\.0\.attn"):
        simulate(graph, "sanger", masks=masks)


def test_sanger_needs_its_predictor(graph):
    hardware = load("sanger")
    engines = {name: engine for name, engine in hardware.engines.items() if name != "predictor"}
    with pytest.raises(InputError, match="no array 'predictor'"):
        simulate(graph, replace(hardware, engines=engines))
