"""MatAdd and MatShift compiled for LLVM equal their references, with our loop orders and with TVM's plain ones."""

import shutil
import subprocess

import numpy as np
import pytest
import torch

from vitrify.ops import pack_codes, shift_decode, shift_quantize
from vitrify.ops.hamming.reference import masked_sum

tvm = pytest.importorskip("tvm", reason="needs TVM: pip install 'vitrify[tvm]'")
from tvm import te  # noqa: E402
from tvm.s_tir import dlight  # noqa: E402

from vitrify.tvm import build, leaves, operators, schedules  # noqa: E402

SHAPES = [(1, 3, 197, 64, 64), (2, 1, 5, 7, 33), (1, 1, 4, 1, 2)]


def function(expression, *arrays):
    inputs = [te.placeholder(array.shape, str(array.dtype).removeprefix("torch."), "input") for array in arrays]
    output = expression(*inputs)
    return te.create_prim_func([*inputs, output]), output


def scheduled(func, target):
    with target:
        return dlight.ApplyDefaultSchedule(*schedules.rules(target))(tvm.IRModule({"main": func}))


def computed(expression, *arrays, plain=False):
    """Run the expression on LLVM into memory that holds NaN; integers cannot, they start at -1."""
    func, output = function(expression, *arrays)
    target = build.target("llvm")
    module = tvm.IRModule({"main": func}) if plain else scheduled(func, target)
    shape, dtype = [int(size) for size in output.shape], str(output.dtype)
    out = tvm.runtime.tensor(np.full(shape, np.nan if dtype == "float32" else -1, dtype))
    tvm.compile(module, target)["main"](*(tvm.runtime.tensor(array.contiguous().numpy()) for array in arrays), out)
    return torch.from_numpy(out.numpy())


def codes_of(kind, *shape):
    bits = torch.randint(0, 2, shape)
    return (bits if kind == "binary" else 2 * bits - 1).to(torch.int8)


@pytest.mark.parametrize("kind", ["binary", "sign"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mat_add_is_the_masked_sum(shape, transposed, kind):
    torch.manual_seed(0)
    batch, heads, height, depth, width = shape
    code = codes_of(kind, batch, heads, *((depth, height) if transposed else (height, depth)))
    rows = torch.randint(-1000, 1000, (batch, heads, depth, width)).float()  # any order of summing is exact
    out = computed(lambda c, r: operators.mat_add(c, r, kind, transposed=transposed), code, rows)
    assert torch.equal(out, masked_sum(code.mT if transposed else code, rows))


def test_rows_that_no_code_selects_are_never_added():
    rows = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
    code = torch.tensor([[1, 0]], dtype=torch.int8)
    assert torch.equal(computed(lambda c, r: operators.mat_add(c, r, "binary"), code, rows), rows[:1])


def packed(bits, variant, outputs=70, inputs=37):
    torch.manual_seed(bits)
    codes, exponent = shift_quantize(
        torch.randn(outputs, inputs) * torch.logspace(-3, 3, outputs)[:, None], bits, variant
    )
    return codes, pack_codes(codes, bits), exponent


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
@pytest.mark.parametrize("variant", ["ps", "q"])
def test_mat_shift_decodes_every_code_exactly(bits, variant):
    codes, by_output, exponent = packed(bits, variant)
    assert len(codes.unique()) > 2 ** (bits - 2)
    out = computed(lambda r, p, e: operators.mat_shift(r, p, e, bits, variant), torch.eye(37), by_output.mT, exponent)
    assert torch.equal(out, shift_decode(codes, exponent, bits, variant).mT)


@pytest.mark.parametrize("bits", [3, 4, 5, 6])
@pytest.mark.parametrize("variant", ["ps", "q"])
def test_the_integer_mat_shift_is_exact(bits, variant):
    _, by_output, _ = packed(bits, variant)
    rows = torch.randint(-128, 128, (2, 11, 37), dtype=torch.int8)
    out = computed(lambda r, p: operators.mat_shift_integer(r, p, bits, variant), rows, by_output.mT)
    assert torch.equal(out, leaves.OPS.mat_shift_integer(rows, by_output, bits, variant))


def dense(a, b):
    k = te.reduce_axis((0, a.shape[-1]), "k")
    sums = te.compute((*a.shape[:-1], b.shape[-1]), lambda *i: te.sum(a[(*i[:-1], k)] * b[k, i[-1]], axis=k))
    return te.compute(sums.shape, lambda *i: te.max(sums[i] + 1.0, 0.0))


@pytest.mark.parametrize("shape", [(2, 197, 40, 66), (8, 3, 5, 2), (1, 1, 7, 1000)], ids=str)
def test_our_loop_orders_change_no_sum(shape):
    torch.manual_seed(0)
    batch, height, depth, width = shape
    a, b = torch.randn(batch, height, depth), torch.randn(depth, width)
    bound = 2 * depth * torch.finfo(torch.float32).eps * (a.abs() @ b.abs()).max().item()
    for plain in (False, True):
        assert (computed(dense, a, b, plain=plain) - (a @ b + 1).relu()).abs().max() <= bound


CUDA = {
    "add": (
        lambda c, r: operators.mat_add(c, r, "sign", transposed=True),
        (codes_of("sign", 1, 3, 197, 64), torch.zeros(1, 3, 197, 64)),
    ),
    "shift": (
        lambda r, p, e: operators.mat_shift(r, p, e, 4, "ps"),
        (torch.zeros(1, 197, 64), torch.zeros(32, 96, dtype=torch.uint8), torch.zeros(96, dtype=torch.int8)),
    ),
    "integer": (
        lambda r, p: operators.mat_shift_integer(r, p, 5, "q"),
        (torch.zeros(197, 64, dtype=torch.int8), torch.zeros(64, 96, dtype=torch.uint8)),
    ),
}


@pytest.mark.parametrize("name", CUDA)
def test_cuda_source_is_written_and_compiles_where_nvcc_is(name, tmp_path):
    expression, arrays = CUDA[name]
    target = build.target("cuda")
    func, _ = function(expression, *arrays)
    source = build.cuda_source(tvm.compile(scheduled(func, target), target))
    assert "__global__" in source
    if shutil.which("nvcc") is None:
        pytest.skip("source written; no nvcc here to compile it with")
    (tmp_path / "kernel.cu").write_text(source)
    command = ["nvcc", "-arch=sm_80", "-cubin", "-w", "-Xptxas", "-v", "-o", "kernel.cubin", "kernel.cu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0 bytes spill stores" in done.stderr
