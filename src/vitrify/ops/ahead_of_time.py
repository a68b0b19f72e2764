"""Compile Triton kernels for GPUs that are not there, and read what came out: registers, spills, shared memory.

    with recorded_launches() as launches:
        triton.forward(*meta_tensors)           # any code that launches kernels; nothing runs
    for launch in launches:
        print(compiled(launch, arch=90))

A launch on meta tensors has the very arguments of a real one, and Triton itself says what it would know about them
(strides of 1, multiples of 16), so that what is compiled is what would run. For tests and tools: imports Triton.
"""

from __future__ import annotations

import collections
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ARCHITECTURES = (80, 90, 100)
# Shared memory that one program may have, in bytes (CUDA C++ Programming Guide, compute capabilities), and what it has
# on 8.6, 8.9 and 12.0 (A10, L4, RTX), which get the same tiles as 8.0.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
SMALL_SHARED = 101_376
# The largest grid along x, and along y and z.
GRID_LIMIT = (2**31 - 1, 65_535, 65_535)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One launch of a kernel: its grid, positional arguments, and keywords with constants and compiler options."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, without its module."""
        return str(self.kernel.__name__)


class Compiled(NamedTuple):
    """What a kernel takes on one GPU architecture.

    registers     per thread
    stack         bytes of local memory per thread
    local         instructions that move local memory; 0 with `stack` unless registers spill
    shared        bytes of shared memory per program
    threads       per program
    instructions  how often each opcode stands in the machine code
    """

    registers: int
    stack: int
    local: int
    shared: int
    threads: int
    instructions: collections.Counter[str]

    def tensor_core(self) -> str:
        """Return the opcode that feeds the tensor cores, the most frequent one; '' if none does.

        HMMA, IMMA (mma); HGMMA, QGMMA for E4M3, IGMMA (wgmma); UTCHMMA, UTCQMMA for E4M3, UTCIMMA (tcgen05).
        """
        return max((name for name in self.instructions if "MMA" in name), key=self.instructions.__getitem__, default="")


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record every launch of a Triton kernel in this context, and run none."""
    launches: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if callable(grid):
            grid = grid(dict(zip(self.arg_names, arguments, strict=False)) | keywords)
        launches.append(Launch(self, tuple(grid), arguments, keywords))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compiled(launch: Launch, arch: int) -> Compiled:
    """Compile a launch for compute capability `arch` (80, 90, 100: A100, H100, B200), without a GPU, in seconds.

    Raises what Triton raises for a kernel that the architecture cannot run, as E4M3 on 80.
    """
    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    # Triton's own steps between a launch and its compiler (JITFunction.run).
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(*launch.arguments, **launch.keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.keywords, arguments, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / tool, option, file], check=True, capture_output=True, text=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", code, re.MULTILINE)
    counter = collections.Counter(opcodes)
    registers, stack = (int(m.group(1)) for m in (re.search(rf"{name}:(\d+)", usage) for name in ("REG", "STACK")) if m)
    local, threads = counter["LDL"] + counter["STL"], 32 * binary.metadata.num_warps
    return Compiled(registers, stack, local, binary.metadata.shared, threads, counter)
