"""Kernels compiled without a GPU: what is read from them is what they do."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') == '1'", reason="the interpreter compiles nothing")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from vitrify.ops.ahead_of_time import ARCHITECTURES, compiled, recorded_launches  # noqa: E402


@triton.jit(do_not_specialize=("length",))
def product_kernel(a, b, out, stride, length, SIZE: tl.constexpr, WIDE: tl.constexpr = False):
    """Multiply two square tiles; WIDE keeps numbers alive for which two warps have no registers."""
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    inside = rows < length
    x = tl.load(a + rows * stride + columns, mask=inside, other=0.0)
    y = tl.load(b + rows * stride + columns)
    if WIDE:
        result = x.to(tl.float32)
        for _ in range(length):
            result = tl.exp(result) + tl.trans(result)
    else:
        result = tl.dot(x, y)
    tl.store(out + rows * stride + columns, result)


def launch(dtype=torch.float16, size=64, length=197, **options):
    """Return the recorded launch of one product on meta tensors."""
    a, b = (torch.empty(size, size, dtype=dtype, device="meta") for _ in range(2))
    out = torch.empty(size, size, device="meta")
    with recorded_launches() as launches:
        product_kernel[1, 3](a, b, out, a.stride(0), length, SIZE=size, enable_fp_fusion=True, **options)
    assert out.device.type == "meta"
    return launches[0]


def test_a_launch_is_recorded_and_not_run():
    recorded = launch(num_warps=8)
    assert (recorded.name, recorded.grid) == ("product_kernel", (1, 3))
    assert recorded.keywords == {"SIZE": 64, "num_warps": 8, "enable_fp_fusion": True}


def test_a_grid_that_follows_from_the_arguments():
    with recorded_launches() as launches:
        product_kernel[lambda meta: (meta["length"] // meta["SIZE"],)](None, None, None, 1, 128, SIZE=32)
    assert launches[0].grid == (4,)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_cores_by_architecture(arch):
    found = compiled(launch(), arch)
    assert found.tensor_core() == {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
    assert found.stack == found.local == 0
    assert 16 < found.registers <= 255
    assert found.threads == 128
    assert found.instructions["EXIT"] > 0


@pytest.mark.parametrize(("arch", "opcode"), [(90, "QGMMA"), (100, "UTCQMMA")])
def test_e4m3(arch, opcode):
    assert compiled(launch(torch.float8_e4m3fn), arch).tensor_core() == opcode


def test_spills_show():
    spilling = compiled(launch(size=128, WIDE=True, num_warps=2), 80)
    assert spilling.stack > 0
    assert spilling.local > 0
    assert spilling.tensor_core() == ""


def test_what_triton_would_know_decides_the_code():
    """A stride of 64 allows wide loads, one of 63 does not; a length that is not specialised changes nothing."""
    plain = compiled(launch(), 80)
    assert compiled(launch(length=192), 80) == plain
    assert compiled(launch(length=1), 80) == plain
    odd = launch()
    odd = odd._replace(arguments=(*odd.arguments[:3], 63, odd.arguments[4]))
    assert sum(compiled(odd, 80).instructions.values()) > 1.5 * sum(plain.instructions.values())
