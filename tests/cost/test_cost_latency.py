"""The roofline: each rule on a workload small enough to work out by hand, then on real models."""

import json

import pytest
import timm
import torch

import vitrify
from vitrify import InputError, Recipe
from vitrify.cost.fusion import kernels
from vitrify.cost.graph import Operand, Operation, Workload
from vitrify.cost.latency import latency
from vitrify.cost.roofline import product_kind
from vitrify.cost.target_file import load

torch.set_num_threads(1)
H100 = load("h100")


def linear(m, k, n, bits=32, weight_bits=32, name="fc", after="x", number=0, primitive="multiply"):
    """A linear layer as an operation, reading `after`."""
    producer = after.partition(".")[0] if after.startswith("op") else None
    x = Operand(after, (m, k), bits, "activation", producer)
    w = Operand(f"{name}.weight", (n, k), weight_bits, "weight")
    out = Operand(f"op{number}.out", (m, n), 32, "activation", f"op{number}")
    widths = (bits, weight_bits, 32)
    return Operation(f"op{number}", name, "matmul", (x, w), (out,), primitive=primitive, m=m, k=k, n=n, bits=widths)


def vector(kind, after, number, shape, other=None):
    inputs = [Operand(name, shape, 32, "activation", name.partition(".")[0]) for name in (after, other) if name]
    out = Operand(f"op{number}.out", shape, 32, "activation", f"op{number}")
    size = shape[0] * shape[1]
    return Operation(f"op{number}", "act", "vector", tuple(inputs), (out,), vector=kind, elements=size)


def graph(*operations):
    return Workload("by hand", (1,), operations, {})


def model(name="deit_tiny_patch16_224", recipe=None, size=224, **kwargs):
    with torch.device("meta"):
        built = timm.create_model(name, **kwargs).eval()
    if recipe is not None:
        vitrify.convert_(built, recipe, input_size=(3, size, size))
    return vitrify.workload(built, (3, size, size))


def test_arithmetic_binds_a_large_product():
    found = latency(graph(linear(8192, 8192, 8192)), "h100", fusion="eager")
    # 128 x 128 x 32 tiles of 64 x 64 x 256 on 132 processors: the last round is not full.
    tiles = 128 * 128 * 32
    occupancy = tiles / (-(-tiles // 132) * 132)
    arithmetic = 2 * 8192**3 / (H100.si("peak.bf16") * H100.si("efficiency.matmul") * occupancy)
    assert found.seconds == pytest.approx(arithmetic + H100.si("launch.eager"))
    assert found.operations[0].limit == "arithmetic"


def test_bytes_bind_one_row_and_codes_are_narrower():
    rows = {name: latency(graph(linear(1, 16384, 16384, **kwargs)), "h100") for name, kwargs in ROW.items()}
    moved = 2 * (16384**2 + 2 * 16384)
    assert rows["float"].operations[0].limit == "bytes"
    launch = H100.si("launch.compiled")
    bandwidth = H100.si("bandwidth.memory") * H100.si("efficiency.memory")
    assert rows["float"].seconds - launch == pytest.approx(moved / bandwidth, rel=1e-3)
    # 4-bit weights: a quarter of the bytes of bfloat16.
    assert (rows["float"].seconds - launch) / (rows["shift"].seconds - launch) == pytest.approx(4, rel=1e-2)


ROW = {"float": {}, "shift": {"weight_bits": 4, "primitive": "shift"}}


def test_eight_bits_run_as_the_target_can():
    integer = graph(linear(4096, 4096, 4096, bits=8, weight_bits=8))
    floats = latency(graph(linear(4096, 4096, 4096)), "h100", fusion="eager").times[0].arithmetic_s
    for eight_bit in ("int8", "fp8"):
        found = latency(integer, "h100", fusion="eager", eight_bit=eight_bit).times[0].arithmetic_s
        assert floats / found == pytest.approx(2, rel=1e-3)
    with pytest.raises(InputError, match=r"op0 \(fc\): target 'a100' has no peak for fp8"):
        latency(integer, "a100", eight_bit="fp8")


def test_compiled_element_wise_work_joins_the_kernel_that_made_its_operand():
    work = graph(
        linear(64, 64, 64),
        vector("erf", "op0.out", 1, (64, 64)),
        vector("add", "op1.out", 2, (64, 64), "op0.out"),
        linear(64, 64, 64, after="op2.out", number=3, name="fc2"),
    )
    eager, compiled = kernels(work, "eager"), kernels(work, "compiled")
    assert [len(kernel.operations) for kernel in eager] == [1, 1, 1, 1]
    assert [[op.id for op in kernel.operations] for kernel in compiled] == [["op0", "op1", "op2"], ["op3"]]
    assert [operand.tensor for operand in compiled[0].writes] == ["op2.out"]
    assert [operand.tensor for operand in compiled[0].reads] == ["x", "fc.weight"]
    assert latency(work, "h100", fusion="compiled").seconds < latency(work, "h100", fusion="eager").seconds


def test_a_residual_joins_the_later_of_its_makers():
    work = graph(
        linear(8, 8, 8),
        linear(8, 8, 8, after="op0.out", number=1, name="fc2"),
        vector("add", "op0.out", 2, (8, 8), "op1.out"),
    )
    assert [[op.id for op in kernel.operations] for kernel in kernels(work, "compiled")] == [["op0"], ["op1", "op2"]]


def test_times_add_up_by_module_and_operation():
    found = latency(model(), "a100")
    modules = found.modules()
    assert modules[""] == pytest.approx(found.seconds)
    assert sum(modules[f"blocks.{index}"] for index in range(12)) < found.seconds
    assert modules["blocks.3"] == pytest.approx(modules["blocks.4"])
    assert found.seconds == pytest.approx(sum(time.seconds for time in found.times))
    assert found.fits


def test_wider_floats_and_larger_batches_take_longer():
    work = model(size=384, img_size=384)
    times = [latency(work, "h100", dtype=dtype).seconds for dtype in ("bf16", "tf32", "fp32")]
    assert times == sorted(times)
    with pytest.raises(InputError, match="unknown dtype 'fp8'"):
        latency(work, "h100", dtype="fp8")
    with pytest.raises(InputError, match="target 'jetson_tx2' has no peak for bf16"):
        latency(work, "jetson_tx2", dtype="bf16")
    with pytest.raises(InputError, match="unknown fusion 'jit'"):
        latency(work, "h100", fusion="jit")


def test_what_does_not_fit():
    huge = graph(linear(1, 200_000, 300_000))
    assert not latency(huge, "h100").fits
    assert latency(huge, "h200").fits  # 120 GB of bfloat16


def test_each_primitive_is_what_really_runs():
    recipe = Recipe("all", attention="hamming", projections="shift", mlp={"primitive": "shift", "activations": "int8"})
    found = {(op.module.split(".", 2)[-1], op.step): op for op in model(recipe=recipe).operations if op.macs}
    assert product_kind(found["attn.qkv", ""]) == "shift"
    assert product_kind(found["mlp.fc1", ""]) == "shift8"
    assert found["mlp.fc1", ""].bits == (8, 4, 32)
    assert product_kind(found["attn.core", "M"]) == "batched"
    softmax = {op.step: op for op in model().operations if op.macs}
    assert product_kind(softmax["qk"]) == product_kind(softmax["av"]) == "attention"


def test_measured_attention_takes_precedence(tmp_path):
    case = {"tokens": 197, "heads": 3, "head_dim": 64, "batch_size": 1, "dtype": "bfloat16"}
    row = {"case": case, "contender": "SDPA packed compiled", "timing": {"median_ms": 1.5}}
    others = [
        {**row, "contender": "SDPA packed", "timing": {"median_ms": 9.0}},
        {**row, "case": {**case, "tokens": 577}, "timing": {"median_ms": 9.0}},
        {**row, "timing": None},
    ]
    file = tmp_path / f"attention-{H100.machine}.json"
    file.write_text(json.dumps({"machine": {"threads": 8}, "rows": [*others, row]}))
    computed, found = latency(model(), "h100"), latency(model(), "h100", measured=tmp_path)
    cores = [op for op in found.operations if op.measured]
    assert {op.step for op in cores} == {"qk", "softmax", "av"}
    assert sum(op.seconds for op in cores) == pytest.approx(12 * 1.5e-3)
    rest = {op.id: op.seconds for op in computed.operations}
    assert all(op.seconds == rest[op.id] for op in found.operations if not op.measured)
    # Neither another machine's results nor another number of threads are this one's.
    assert latency(model(), "a100", measured=tmp_path).seconds == latency(model(), "a100").seconds
    file.rename(tmp_path / f"attention-{load('cpu').machine}.json")
    assert not any(op.measured for op in latency(model(), "cpu", dtype="bf16", measured=tmp_path).operations)


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / f"models-{H100.machine}.json").write_text('{"rows": [{}]}')
    with pytest.raises(InputError, match="is no result of `vitrify bench`: KeyError"):
        latency(model(), "h100", measured=tmp_path)
