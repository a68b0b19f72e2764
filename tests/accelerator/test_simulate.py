"""What no simulation may break: bounds, monotony, determinism, energy as a sum; and errors that name what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_workloads import chain, chains, linear, machine, vector

import vitrify
from vitrify.accelerator.hardware import load, names
from vitrify.accelerator.placement import Mapping, Placement
from vitrify.accelerator.prices import Prices
from vitrify.accelerator.program import DRAM, Job, run
from vitrify.accelerator.schedules import place
from vitrify.accelerator.simulate import simulate
from vitrify.artefact import create_model
from vitrify.cost.graph import Workload
from vitrify.errors import InputError

quick = settings(max_examples=25, deadline=None)


def vit(recipe=None, **options):
    model = create_model("vit_mini_patch2_28", num_classes=10)
    if recipe is not None:
        vitrify.convert_(model, recipe)
    return vitrify.workload(model, (1, 28, 28), **options)


@pytest.fixture(scope="module")
def taylor():
    return vit(vitrify.recipes.vitality(), taylor="algorithm1")


@quick
@given(chains, st.sampled_from([4, 16, 33]), st.sampled_from([48, 200]), st.sampled_from([1.0, 60.0]))
def test_never_faster_than_products_over_pes_nor_than_bits_over_bandwidth(workload, side, kib, gb_per_s):
    hardware = machine(side, side, kib, gb_per_s)
    result = simulate(workload, hardware)
    assert result.cycles >= workload.macs / side**2
    moved = result.bits["dram read"] + result.bits.get("dram write", 0)
    assert result.cycles >= moved / hardware.dram_bits_per_cycle
    weights = sum(op.k * op.n * 8 for op in workload.operations if op.kind == "matmul")
    assert result.bits["dram read"] >= weights + 8 * workload.operations[0].m * workload.operations[0].k - 1e-6
    assert result.macs["array"] == workload.macs


@quick
@given(chains, st.sampled_from([0.5, 4.0]), st.floats(1, 50))
def test_more_bandwidth_is_never_slower(workload, gb_per_s, more):
    slow, fast = (simulate(workload, machine(gb_per_s=value)) for value in (gb_per_s, gb_per_s * more))
    assert fast.cycles <= slow.cycles


@quick
@given(chains, st.integers(40, 300), st.integers(0, 600))
def test_more_sram_is_never_slower(workload, kib, more):
    small, large = (simulate(workload, machine(kib=value, gb_per_s=2.0)) for value in (kib, kib + more))
    assert large.cycles <= small.cycles


@quick
@given(chains, st.sampled_from([(8, 16), (16, 32), (32, 64)]))
def test_more_pes_are_never_slower(workload, sides):
    small, large = (simulate(workload, machine(side, side)) for side in sides)
    assert large.cycles <= small.cycles


@pytest.mark.parametrize("kib", [48, 100, 200, 400])
def test_more_of_anything_is_never_slower_for_a_vit(taylor, kib):
    base = load("vitality").with_({"sram_kib": kib})
    cycles = simulate(taylor, base).cycles
    assert simulate(taylor, base.with_({"sram_kib": 1.7 * kib})).cycles <= cycles
    assert simulate(taylor, base.with_({"dram.gb_per_s": 100})).cycles <= cycles
    assert simulate(taylor, base.with_({"engines.general.port_bits": 8192})).cycles <= cycles


@quick
@given(chains)
def test_deterministic_and_its_resources_do_one_thing_at_a_time(workload):
    first, second = (simulate(workload, machine()) for _ in range(2))
    assert [(j.resource, j.start, j.end) for j in first.jobs] == [(j.resource, j.start, j.end) for j in second.jobs]
    ends = {}
    for job in first.jobs:
        assert job.start >= ends.get(job.resource, 0)
        assert job.start >= max((other.ready for other in job.after), default=0)
        assert job.end - job.start >= job.duration >= job.work
        ends[job.resource] = job.end
    assert first.cycles == max(job.ready for job in first.jobs)


def test_energy_is_the_sum_of_counted_actions_times_the_table():
    hardware = machine(kib=4096, gb_per_s=50)
    workload = Workload("one", (64, 64), (linear(0, 64, 64, 64),), {})
    result = simulate(workload, hardware)
    prices = Prices(hardware)
    macs, operand, out = 64**3, 64 * 64 * 8, 64 * 64 * 8
    assert result.energy_pj["array"] == pytest.approx(macs * prices.product("multiply", 8, 8))
    assert result.energy_pj["registers"] == pytest.approx(macs * (3 * 8 + 2 * 24) * prices.levels["register"])
    assert result.bits["dram read"] == 2 * operand
    assert result.bits["dram write"] == out
    assert result.energy_pj["dram"] == pytest.approx((2 * operand + out) * prices.levels["dram"])
    moved = (
        result.bits["sram read"] * prices.levels["sram read"] + result.bits["sram write"] * prices.levels["sram write"]
    )
    assert result.energy_pj["sram"] == pytest.approx(moved)
    assert result.total_pj == pytest.approx(sum(result.energy_pj.values()))
    assert sum(operation.pj for operation in result.operations) == pytest.approx(result.total_pj)


def test_every_product_and_scalar_of_a_vit_is_done(taylor):
    result = simulate(taylor, "vitality")
    assert sum(result.macs.values()) == pytest.approx(taylor.macs)
    starts = {cost.id: cost for cost in result.operations}
    for operation in taylor.operations:
        if operation.vector != "move":
            assert starts[operation.id].end > starts[operation.id].start, operation


def test_the_pipeline_overlaps_attentions_steps(taylor):
    with_it, without = (simulate(taylor, "vitality", pipeline=value) for value in (True, False))
    assert with_it.attention_cycles < without.attention_cycles
    assert with_it.cycles < without.cycles
    assert with_it.macs == without.macs


def test_the_hardware_of_the_paper_runs_each_step_on_its_own_unit(taylor):
    engines = {(o.step, o.engine) for o in simulate(taylor, "vitality").operations if o.step}
    assert {
        ("1", "accumulators"),
        ("1", "dividers"),
        ("1", "adders"),
        ("2", "general"),
        ("3", "accumulators"),
    } <= engines
    assert {("4", "diagonal"), ("5", "general"), ("5", "adders"), ("6", "dividers")} <= engines


def test_g_stationary_saves_writing_g_and_needs_pes_that_keep_it(taylor):
    hardware = load("vitality").with_(
        {"engines.general.in_place": True, "engines.general.dataflows": ["output", "weight"]}
    )
    down = simulate(taylor, hardware)
    stationary = simulate(taylor, hardware, schedule="g-stationary")
    saved = down.bits["sram write"] - stationary.bits["sram write"]
    assert saved > 0
    assert stationary.total_mm2 == down.total_mm2 > simulate(taylor, "vitality").total_mm2
    with pytest.raises(InputError, match=r"array 'general' .* cannot keep G in place"):
        simulate(taylor, "vitality", schedule="g-stationary")


@pytest.mark.parametrize("name", names())
def test_every_preset_runs_softmax_and_reports_itself(name):
    workload = vit()
    result = simulate(workload, name)
    assert name in ("sanger", "vitcod") or sum(result.macs.values()) == pytest.approx(workload.macs)
    assert 0 < max(result.utilisation.values()) <= 1
    assert result.hardware.title in str(result)
    assert set(result.area_mm2) == {*result.hardware.engines, "sram"}


def test_experts_of_a_mixture_run_side_by_side():
    workload = vit(vitrify.recipes.shiftaddvit(), split={"multiply": 0.5, "shift": 0.5})
    result = simulate(workload, "shiftadd")
    spans = {}
    for cost in result.operations:
        if ".mlp" in cost.module and cost.engine in ("multiply", "shift") and cost.module.startswith("blocks.0."):
            spans.setdefault(cost.engine, []).append((cost.start, cost.end))
    assert min(spans["shift"])[0] < max(end for _, end in spans["multiply"])
    assert min(spans["multiply"])[0] < max(end for _, end in spans["shift"])


def test_narrow_weights_move_fewer_bits():
    wide, narrow = (Workload("one", (64, 512), (linear(0, 64, 512, 512, weight_bits=b),), {}) for b in (8, 4))
    saved = simulate(wide, machine()).bits["dram read"] - simulate(narrow, machine()).bits["dram read"]
    assert saved >= 512 * 512 * 4


def test_a_second_image_costs_no_more_than_twice_the_first():
    one = simulate(vit(), "systolic")
    two = simulate(vit(batch_size=2), "systolic")
    assert one.cycles < two.cycles <= 2.05 * one.cycles


def test_jobs_wait_for_results_buffers_and_streams():
    first = Job("a", 0, 10, 10, 5, ())
    after = Job("b", 0, 1, 1, 0, (first,))
    frees = Job("c", 0, 1, 1, 0, (), frees=(first,))
    streams = Job("d", 0, 2, 2, 0, (), streams=((first, 3),))
    behind = Job("b", 0, 4, 7, 0, ())
    total, queues = run([first, after, frees, streams, behind])
    assert (after.start, frees.start, streams.start, streams.end) == (15, 10, 3, 13)
    assert (behind.start, total) == (16, 23)
    assert (queues["b"].busy, queues["b"].port, queues["b"].idle["operand"]) == (8, 3, 0)


def test_the_trace_is_a_chrome_trace(taylor):
    result = simulate(taylor, "vitality")
    events = json.loads(json.dumps(result.trace()))["traceEvents"]
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert DRAM in rows.values()
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == len(result.jobs)
    assert max(event["ts"] + event["dur"] for event in spans) <= result.seconds * 1e6 + 1e-6


# Bad input


def test_an_engine_that_the_workload_needs_and_the_hardware_lacks_is_named():
    base = machine()
    special = replace(base.engines["special"], does=("mul", "add"))
    compares = Workload("w", (8, 8), (linear(0, 8, 8, 8), vector(1, (8, 8), "op0.out", "compare")), {})
    with pytest.raises(InputError, match=r"no engine that does compare, which op1 \(act1\) needs"):
        simulate(compares, replace(base, engines={**base.engines, "special": special}))
    shifts = replace(base.engines["array"], primitives=("shift",))
    with pytest.raises(InputError, match=r"no array whose PEs multiply, which op0 \(layer0\) needs"):
        simulate(chain(8, [8, 8]), replace(base, engines={**base.engines, "array": shifts}))


def test_an_sram_too_small_for_any_tile_is_named_with_the_layer():
    with pytest.raises(InputError, match=r"sram_kib of 4 is too small"):
        simulate(chain(8, [8, 8]), machine(kib=4))
    with pytest.raises(InputError, match=r"op0 \(layer0\), 8 x 8 x 8, does not fit"):
        simulate(chain(8, [8, 8]), machine(kib=0.1), mappings=[Mapping(0.02, "strips")])


def test_a_schedule_against_the_order_of_the_workload_is_refused():
    def backwards(workload, hardware, masks):
        return [place(operation, hardware) for operation in reversed(workload.operations)]

    with pytest.raises(InputError, match=r"runs op3 \(act3\) before op2, whose result 'op2.out' it reads"):
        simulate(chain(8, [8, 8, 8]), machine(), schedule=backwards)


def test_a_schedule_that_names_no_engine_of_the_hardware_is_refused():
    def astray(workload, hardware, masks):
        return [Placement(operation, "arrray") for operation in workload.operations]

    with pytest.raises(InputError, match="did you mean 'array'"):
        simulate(chain(8, [8, 8]), machine(), schedule=astray)

    def wrong(workload, hardware, masks):
        return [Placement(operation, "special") for operation in workload.operations]

    with pytest.raises(InputError, match=r"product op0 \(layer0\) on 'special'"):
        simulate(chain(8, [8, 8]), machine(), schedule=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "vitalty"}, "did you mean 'vitality'"),
        ({"drain": "never"}, "unknown drain"),
        ({"objective": "speed"}, "unknown objective"),
        ({"mappings": [Mapping(64, "strips")]}, "too small"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        simulate(chain(8, [8, 8]), machine(), **options)
