"""The profile of a model: nothing counted twice, nothing lost, and each thing in the group that it belongs to."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import timm
import torch
from torch import nn

import vitrify
from vitrify import InputError, LinearSpec, Recipe
from vitrify.cost.groups import group_of
from vitrify.cost.latency import latency
from vitrify.cost.profile import Costs, profile


def deit(depth=2):
    with torch.device("meta"):
        return timm.create_model("deit_tiny_patch16_224", depth=depth)


@pytest.mark.parametrize(
    ("module", "step", "group"),
    [
        ("blocks.3.attn.qkv", "", "blocks.*.attn"),
        ("blocks.3.attn", "softmax", "blocks.*.attn core"),
        ("blocks.3.attn.core.query_binariser", "codes", "blocks.*.attn core"),
        ("blocks.3.attn.value_conv.conv", "", "blocks.*.attn core"),
        ("stages.1.blocks.0.mlp.fc1.shift", "", "stages.*.blocks.*.mlp"),
        ("stages.1.blocks.0", "", "stages.*.blocks.*"),
        ("vit.encoder.layer.11.attention.attention", "av", "vit.encoder.layer.*.attention core"),
        ("patch_embed.proj", "", "patch_embed.proj"),
        ("", "", "(model)"),
    ],
)
def test_groups(module, step, group):
    assert group_of(module, step) == group


def test_the_total_is_that_of_the_model():
    model = deit()
    result = profile(model)
    graph = vitrify.workload(model)
    total = result.total
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total.weight_bytes == 4 * total.parameters  # all of them are read, once
    scalar = {kind: sum(op.elements for op in graph.operations if op.vector == kind) for kind in ("mul", "add", "move")}
    assert total.multiplications == graph.macs + scalar["mul"]
    assert total.additions == graph.macs + scalar["add"]
    assert total.shifts == 0
    every = sum(op.elements for op in graph.operations if op.kind == "vector")
    assert total.others == every - sum(scalar.values()) > 0
    assert total.energy_pj == pytest.approx(vitrify.energy(graph).total_pj)
    assert total.dram_bytes == pytest.approx(vitrify.energy(graph).total.dram / 12.5 / 8)
    assert total.latency_s == pytest.approx(latency(graph, "h100").seconds)
    assert result.rows["blocks.*.attn core"].parameters == 0
    assert result.rows["blocks.*.mlp"].parameters == 2 * (2 * 192 * 768 + 192 + 768)


def test_bytes_of_a_layer_by_hand():
    """16 -> 32 over 4 tokens: one weight and one bias in, one output, all float32."""
    result = profile(nn.Linear(16, 32), (3, 4, 16))
    assert result.total.weight_bytes == 4 * (16 * 32 + 32)
    assert result.total.activation_bytes == 4 * 3 * 4 * 32
    assert result.total.dram_bytes >= 4 * (16 * 32 + 3 * 4 * 16 + 3 * 4 * 32)


def test_a_batch_costs_activations_and_not_weights():
    one, four = profile(deit()).total, profile(deit(), batch_size=4).total
    assert four.multiplications == 4 * one.multiplications
    assert four.weight_bytes == one.weight_bytes
    assert four.activation_bytes == pytest.approx(4 * one.activation_bytes, rel=0.02)


def test_a_converted_model_shifts_and_adds_in_its_groups():
    before, model = profile(deit()), deit()
    vitrify.convert_(model, vitrify.recipes.shiftaddvit())
    after = profile(model)
    assert after.total.shifts == vitrify.workload(model).count("shift")
    assert after.rows["blocks.*.attn"].shifts == before.rows["blocks.*.attn"].multiplications
    assert after.rows["blocks.*.attn"].multiplications == 0
    assert set(after.rows) == set(before.rows)
    assert after.rows["blocks.*.norm1"].energy_pj == pytest.approx(before.rows["blocks.*.norm1"].energy_pj)


def test_packed_codes_are_parameters_still():
    model = nn.Sequential()
    model.add_module("mlp", nn.Linear(64, 64))
    vitrify.convert_(model, Recipe("shift", modules={"mlp": LinearSpec("shift", bits=4)}))
    latent = profile(model, (3, 4, 64)).total
    vitrify.pack_(model)
    packed = profile(model, (3, 4, 64)).total
    assert latent.parameters == packed.parameters == 64 * 64 + 64
    assert latent.weight_bytes == packed.weight_bytes == 64 * 64 / 2 + 64 + 4 * 64


def test_what_is_unknown_is_said_and_the_steps_are_told():
    class Sorted(nn.Module):
        def forward(self, x):
            return torch.sort(x).values

    told = []
    assert profile(Sorted(), (1, 2, 4), progress=told.append).unknown == {"aten.sort.default": 1}
    assert told == ["tracing", "tiling"]


def test_bad_input_is_named():
    with pytest.raises(InputError, match=r"unknown target 'h1000'.*'h100'"):
        profile(deit(1), target="h1000")
    with pytest.raises(InputError, match="refuses inputs of shape"):
        profile(deit(1), (3, 200, 200))


def test_costs_add_up_field_by_field():
    ones = Costs(*range(1, 11))
    assert asdict(ones + ones) == {name: 2 * value for name, value in asdict(ones).items()}
