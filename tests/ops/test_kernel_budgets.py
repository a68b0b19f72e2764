"""Every kernel compiled for every GPU architecture: spills, registers, shared memory, tensor cores, atomics, grids."""

from __future__ import annotations

import ast

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif("os.environ.get('TRITON_INTERPRET') == '1'", reason="the interpreter compiles nothing")

import triton  # noqa: E402
from triton._C.libtriton import ir  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.compiler.code_generator import CodeGenerator  # noqa: E402

from vitrify.ops.ahead_of_time import GRID_LIMIT, SHARED_LIMIT, SMALL_SHARED, compiled  # noqa: E402
from vitrify.ops.kernel_cases import PRIMITIVES  # noqa: E402

REGISTERS = 65_536  # of a processor
# Instructions that may move spilled registers: a pair of two, of 16-bit heads wider than 64, in the backward pass.
SPILLS = {("reduce_kernel", 100): 2}
TRITON_36 = triton.__version__.startswith("3.6.")
if TRITON_36:
    SPILLS["reduce_kernel", 80] = 5  # of two registers, of bfloat16 heads 80 wide, in the forward pass
    SPILLS["decode_kernel", 80] = 2  # of two registers, of 6-bit codes for float16
CASES = [
    pytest.param(case, arch, id=f"{primitive}: {case.name}, sm_{arch}", marks=[] if case.quick else pytest.mark.matrix)
    for primitive, cases in PRIMITIVES.items()
    for case in cases()
    for arch in case.architectures
]


@pytest.mark.parametrize(("case", "arch"), CASES)
def test_budget(case, arch):
    launches = case.launches()
    assert launches
    for launch in launches:
        found = compiled(launch, arch)
        spills = SPILLS.get((launch.name, arch), 0)
        assert max(found.stack / 4, found.local) <= spills, f"{launch.name} spills: {found}"
        # A program must fit on a processor, or its launch fails; 255 is what a thread can have.
        assert found.registers <= 255
        assert found.registers * found.threads <= REGISTERS, launch.name
        limit = SMALL_SHARED if arch == 80 and not case.large else SHARED_LIMIT[arch]
        assert found.shared <= limit, f"{launch.name} takes {found.shared} bytes of shared memory"
        # Sums that programs add in an order of their own would not give the same bits every time.
        assert not {"ATOM", "ATOMG", "RED", "REDG"} & found.instructions.keys(), launch.name
        assert all(size <= limit for size, limit in zip(launch.grid, GRID_LIMIT, strict=False)), launch.grid
        if TRITON_36 and arch == 100 and launch.name in case.plain and launch.keywords.get("PACKED"):
            continue  # it rounds float32 to TF32, so mixtures decode in memory there: experts.triton._rounds_widened
        assert bool(found.tensor_core()) == (launch.name not in case.plain), f"{launch.name}: {found.tensor_core()!r}"


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_every_primitive_has_a_quick_case(primitive):
    assert any(case.quick for case in PRIMITIVES[primitive]())


class FrontEndDoneError(Exception):
    """The front end is done; the rest of a compilation takes seconds."""


def front_end(source, target, options):
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(options)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    raise FrontEndDoneError


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_no_function_returns_none(primitive, monkeypatch):
    """Triton 3.6, which comes with torch 2.11, does not compile one that does."""
    visit_return = CodeGenerator.visit_Return

    def checked(self, node):
        if isinstance(node.value, ast.Name):  # reading a name makes no code
            value = self.visit(node.value)
            assert getattr(value, "value", value) is not None, f"returns {node.value.id}, which is None"
        return visit_return(self, node)

    monkeypatch.setattr(CodeGenerator, "visit_Return", checked)
    monkeypatch.setattr(triton, "compile", front_end)
    for case in PRIMITIVES[primitive]():
        for launch in case.launches() if case.quick else ():
            with pytest.raises(FrontEndDoneError):
                compiled(launch, 90)
