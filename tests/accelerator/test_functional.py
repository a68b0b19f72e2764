"""Programs run on numbers: equal to fixed-point attention bit for bit, and no longer so without a dependency."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_workloads import chain
from torch import nn

from vitrify.accelerator.functional import POISON, ScheduleError, execute, folded
from vitrify.accelerator.hardware import DATAFLOWS, load
from vitrify.accelerator.placement import Mapping
from vitrify.accelerator.program import DRAM, run
from vitrify.accelerator.simulate import simulate
from vitrify.accelerator.systolic import product
from vitrify.cost.workload import workload
from vitrify.errors import InputError
from vitrify.nn.cores import Taylor
from vitrify.ops.taylor.quantised import SCHEDULES
from vitrify.ops.taylor.widths import Ranges, Widths

torch.set_num_threads(1)
SCALE = 0.3
FORMS = {"algorithm1": "vitality", "affine": "vitality-affine"}
LONG = (1, 2, 300, 280, 12, 10)  # three chunks of tokens, two heads


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = Taylor()

    def forward(self, query, key, value):
        return self.core(query, key, value, scale=SCALE)


def prepared(form, shape, *, seed=0):
    """Return (workload, integer schedule, codes) of attention with (B, H, Nq, Nk, D, Dv)."""
    batch, heads, queries, keys, dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, dim), (keys, dim), (keys, value_dim))
    inputs = [torch.randn(batch, heads, *size, generator=generator) for size in sizes]
    attention = SCHEDULES[form].of(Ranges.of(*inputs, SCALE), keys, SCALE, Widths())
    return workload(Attention(), example_inputs=inputs, taylor=form), attention, attention.quantise(*inputs)


def with_arrays(hardware, **changes):
    """Return hardware whose systolic arrays differ."""
    hardware = load(hardware)
    arrays = {name: replace(array, **changes) for name, array in hardware.arrays.items()}
    return replace(hardware, engines={**hardware.engines, **arrays})


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "serial"])
@pytest.mark.parametrize("dataflow", [None, *DATAFLOWS])
@pytest.mark.parametrize("form", FORMS)
def test_a_program_computes_fixed_point_attention_bit_for_bit(form, dataflow, pipeline):
    work, attention, codes = prepared(form, LONG)
    hardware = with_arrays(FORMS[form], rows=8, columns=8, dataflows=(dataflow,) if dataflow else DATAFLOWS)
    result = simulate(work, hardware, pipeline=pipeline)
    assert torch.equal(execute(result, attention, *codes), attention(*codes))


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "serial"])
def test_g_may_stay_in_the_array(pipeline):
    work, attention, codes = prepared("algorithm1", LONG)
    result = simulate(
        work,
        with_arrays("vitality", in_place=True, dataflows=("output", "weight")),
        schedule="g-stationary",
        pipeline=pipeline,
    )
    assert torch.equal(execute(result, attention, *codes), attention(*codes))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, high) for high in (2, 3, 400, 400, 20, 20))),
    form=st.sampled_from(sorted(FORMS)),
    pipeline=st.booleans(),
    side=st.sampled_from([1, 3, 8, 64]),
    gb_per_s=st.sampled_from([0.2, 5.0, 200.0]),
    kib=st.sampled_from([20, 28, 200]),
    drain=st.sampled_from(["overlapped", "every_fold"]),
)
@example((1, 1, 1, 129, 1, 1), "affine", False, 3, 0.2, 20, "overlapped")  # more chunks than queries
def test_any_shape_on_any_hardware(shape, form, pipeline, side, gb_per_s, kib, drain):
    work, attention, codes = prepared(form, shape)
    hardware = with_arrays(FORMS[form], rows=side, columns=side)
    hardware = replace(hardware, sram_kib=kib, dram=replace(hardware.dram, gb_per_s=gb_per_s))
    result = simulate(work, hardware, pipeline=pipeline, drain=drain)
    assert torch.equal(execute(result, attention, *codes), attention(*codes))


def test_results_that_do_not_stay_come_back_from_dram():
    work, attention, codes = prepared("algorithm1", (1, 4, 400, 400, 64, 64))
    hardware = replace(load("vitality"), sram_kib=20)
    result = simulate(work, hardware, mappings=[Mapping(4, "strips")])
    moved = {job.tensor for job in result.jobs if job.resource == DRAM}
    assert len(moved) > 4, "besides the inputs and the output something must leave the chip"
    assert torch.equal(execute(result, attention, *codes), attention(*codes))


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "serial"])
@pytest.mark.parametrize("form", FORMS)
def test_its_dependencies_suffice_however_long_jobs_take(form, pipeline):
    """It is what jobs wait for, and not luck with their durations, that makes the program right."""
    work, attention, codes = prepared(form, LONG)
    result = simulate(work, FORMS[form], pipeline=pipeline)
    expected, drawn = attention(*codes), random.Random(0)
    for _ in range(4):
        for job in result.jobs:
            job.duration, job.latency = drawn.randint(1, 60), drawn.randint(0, 40)
        run(result.jobs)
        assert torch.equal(execute(result, attention, *codes), expected)


@pytest.mark.parametrize("pipeline", [True, False], ids=["pipeline", "serial"])
@pytest.mark.parametrize("form", FORMS)
def test_without_a_dependency_it_fails(form, pipeline):
    """Each one in turn is taken away: then the program still keeps to it by the order of a queue, or it fails."""
    work, attention, codes = prepared(form, (1, 2, 150, 140, 6, 5))
    result = simulate(work, FORMS[form], pipeline=pipeline)
    expected = attention(*codes)
    times = {id(job): (job.start, job.end) for job in result.jobs}
    failed, earlier = 0, 0
    for job in result.jobs:
        for name in ("after", "frees"):
            whole = getattr(job, name)
            for left_out in range(len(whole)):
                setattr(job, name, [other for index, other in enumerate(whole) if index != left_out])
                run(result.jobs)
                if any(times[id(other)] != (other.start, other.end) for other in result.jobs):
                    earlier += 1
                    try:
                        assert torch.equal(execute(result, attention, *codes), expected)
                    except ScheduleError:
                        failed += 1
            setattr(job, name, whole)
    # Without the pipeline most dependencies are between steps that do not meet: one of several still holds.
    assert failed > 10, (failed, earlier)
    if pipeline:
        assert failed > 0.5 * earlier, (failed, earlier)


def test_every_step_waits_for_what_it_reads():
    """One operation's jobs at a time wait for nothing at all: each of these programs fails."""
    work, attention, codes = prepared("algorithm1", LONG)
    result = simulate(work, "vitality")
    for index, placement in enumerate(result.placements):
        jobs = [job for job in result.jobs if job.operation == index and job.resource != DRAM]
        kept = [(job.after, job.streams) for job in jobs]
        for job in jobs:
            job.after, job.streams = [], []
        run(result.jobs)
        with pytest.raises(ScheduleError, match=rf"{placement.operation.id}, Tile\(.*: a dependency is missing"):
            execute(result, attention, *codes)
        for job, (after, streams) in zip(jobs, kept, strict=True):
            job.after, job.streams = after, streams


def test_a_buffer_taken_over_too_early_is_noticed():
    """Loads that do not wait for the tile whose buffer they fill."""
    work, attention, codes = prepared("affine", (1, 4, 500, 500, 8, 8))
    slow = load("vitality-affine").with_({"engines.accumulators.lanes": 1})
    result = simulate(work, slow)
    assert torch.equal(execute(result, attention, *codes), attention(*codes))
    for job in result.jobs:
        job.frees = []
    run(result.jobs)
    with pytest.raises(ScheduleError, match=r"accumulators, op0.*input1 is not there"):
        execute(result, attention, *codes)


def test_a_job_left_out_leaves_poison():
    work, attention, codes = prepared("affine", (1, 1, 20, 20, 4, 4))
    result = simulate(work, "vitality-affine")
    store = next(job for job in result.jobs if job.tensor == result.placements[-1].operation.outputs[0].tensor)
    shorter = replace(result, jobs=[job for job in result.jobs if job is not store])
    with pytest.raises(ScheduleError, match="in DRAM is not there"):
        execute(shorter, attention, *codes)


@given(
    shape=st.tuples(*(st.integers(1, 40) for _ in range(3))),
    dataflow=st.sampled_from(DATAFLOWS),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
)
def test_folds_cover_a_product_once(shape, dataflow, rows, columns):
    m, k, n = shape
    left, right = torch.randint(-9, 9, (m, k)), torch.randint(-9, 9, (k, n))
    assert torch.equal(folded(left, right, product(shape, rows, columns, dataflow)), left @ right)


def test_no_data_path_reaches_poison():
    for form in FORMS:
        _, attention, codes = prepared(form, (1, 1, 9, 9, 4, 4))
        assert int(attention(*codes).min()) >= -128 > POISON
    assert 2 ** (Widths().partial + Widths().multiplier) < -POISON


def test_other_workloads_are_refused():
    work, attention, codes = prepared("algorithm1", (1, 1, 9, 9, 4, 4))
    _, affine, _ = prepared("affine", (1, 1, 9, 9, 4, 4))
    result = simulate(work, "vitality")
    with pytest.raises(InputError, match=r"op0 \(add, step '1'\) is no part of Taylor attention as Affine computes it"):
        execute(result, affine, *codes)
    with pytest.raises(InputError, match="input2 has shape"):
        execute(result, attention, codes[0], codes[1], codes[2][..., :2])
    layers = simulate(chain(8, [16, 16]), "systolic")
    with pytest.raises(InputError, match="no part of Taylor attention"):
        execute(layers, attention, *codes)
