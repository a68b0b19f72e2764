"""Where a simulated run's time and energy went: the parts add up to the whole, and are called by the right names."""

from __future__ import annotations

import pytest
import torch

import vitrify
from vitrify.cost.explain.groups import Layout
from vitrify.cost.graph import Operand, Operation, Workload
from vitrify.report.breakdown import ORDER, breakdown, groups_of, main_array

SIZE = (1, 28, 28)


@pytest.fixture(scope="module")
def traced():
    """The shipped ViT with Taylor attention, and its parts' names."""
    with torch.device("meta"):
        model = vitrify.create_model("vit_mini_patch2_28")
    layout = Layout.of(model)
    vitrify.convert_(model, vitrify.recipes.vitality())
    graph = vitrify.workload(model, SIZE, taylor="algorithm1")
    return graph, groups_of(graph, layout)


@pytest.fixture(scope="module")
def result(traced):
    return vitrify.simulate(traced[0], "vitality")


@pytest.fixture(scope="module")
def found(traced, result):
    return breakdown(result, traced[1])


def test_every_operation_has_the_group_of_its_module(traced):
    graph, groups = traced
    modules = {operation.id: operation.module for operation in graph.operations}
    assert set(groups) == set(modules)
    for name, group in {"attn.qkv": "qkv", "attn.proj": "proj", "mlp.fc2": "MLP", "norm2": "norms, residuals"}.items():
        inside = {groups[each] for each, module in modules.items() if module.endswith(name)}
        assert inside == {group}
    assert groups["op0"] == "patch embedding"
    assert {f"attention step {step}" for step in range(1, 7)} < set(groups.values()) < set(ORDER)


def test_the_main_arrays_work_and_waits_are_the_whole_run(result, found):
    assert found.main == main_array(result) == "general"
    assert sum(share.array + share.waited for share in found.shares.values()) == result.cycles
    assert sum(share.array for share in found.shares.values()) == result.queues["general"].busy
    before_the_end = sum(share.waited for name, share in found.shares.items() if name != ORDER[-1])
    assert sum(stall.cycles for stall in found.stalls) == before_the_end > 0
    assert [stall.cycles for stall in found.stalls] == sorted((s.cycles for s in found.stalls), reverse=True)


def test_all_energy_and_all_traffic_has_a_group(result, found):
    assert sum(share.pj for share in found.shares.values()) == pytest.approx(result.total_pj)
    assert sum(share.dram for share in found.shares.values()) == result.queues["dram"].busy
    lanes = [name for name in result.queues if name not in ("dram", *result.hardware.arrays)]
    assert sum(share.vectors for share in found.shares.values()) == sum(result.queues[n].busy for n in lanes)


def test_each_queues_uses_add_up_to_the_run(result, found):
    assert next(iter(found.uses)) == "general"
    assert list(found.uses)[-1] == "dram"
    assert set(found.uses) == set(result.queues)
    for name, use in found.uses.items():
        parts = (use.working, use.port, use.operand, use.dram, use.outside)
        assert sum(parts) == result.cycles, name
        assert min(parts) >= 0, name


def test_blocks_lie_in_the_run_one_after_the_other(result, found):
    assert list(found.blocks) == [f"blocks.{number}" for number in range(4)]
    spans = list(found.blocks.values())
    assert [low for low, _ in spans] == sorted(low for low, _ in spans)
    assert all(0 <= low < high <= result.cycles for low, high in spans)


def layer(number, shape, source):
    """A linear layer on vectors of one size."""
    rows, width = shape
    operands = (Operand(source, shape, 8, "activation", source.removesuffix(".out")),)
    operands += (Operand(f"{number}.weight", (width, width), 8, "weight"),)
    out = Operand(f"op{number}.out", shape, 8, "activation", f"op{number}")
    return Operation(f"op{number}", f"{number}", "matmul", operands, (out,), m=rows, k=width, n=width, bits=(8, 8, 24))


def test_a_stall_names_what_was_waited_for():
    """Two layers with an exponent between: the second waits for it, the first for its weights."""
    first = layer(0, (64, 64), "x")
    x = Operand("x", (64, 64), 8, "activation")
    first = Operation(**{**vars(first), "inputs": (x, first.inputs[1])})
    out = Operand("op1.out", (64, 64), 8, "activation", "op1")
    between = Operation("op1", "act", "vector", first.outputs, (out,), vector="exp", elements=64 * 64)
    graph = Workload("two", (64, 64), (first, between, layer(2, (64, 64), "op1.out")), {})
    result = vitrify.simulate(graph, "systolic")
    found = breakdown(result, {"op0": "qkv", "op1": "others", "op2": "proj"})
    reasons = {stall.group: stall.reason for stall in found.stalls}
    assert reasons == {"qkv": "DRAM", "proj": "others on special exp"}
    assert found.blocks == {}


def test_what_a_schedule_splits_stays_in_its_group():
    """Depth-wise convolutions become two operations on the lanes, the first with a new id."""
    with torch.device("meta"):
        model = vitrify.create_model("mobilevit_xxs")
    layout = Layout.of(model)
    graph = vitrify.workload(model, (3, 64, 64))
    result = vitrify.simulate(graph, "systolic")
    assert {p.operation.id for p in result.placements} - {operation.id for operation in graph.operations}
    assert "others" not in breakdown(result, groups_of(graph, layout)).shares
