"""Compile every GPU kernel ahead of time and write what each takes: benchmarks/compile_report.md.

python tools/compile_report.py [primitive ...]      # half an hour on two cores the first time, then cached
python tools/compile_report.py --arch 90 --output benchmarks/compile_report_triton36.md    # as GPU images compile them
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton

from vitrify.files import write_atomically
from vitrify.ops.ahead_of_time import ARCHITECTURES, Compiled, compiled
from vitrify.ops.kernel_cases import PRIMITIVES, Case

REPORT = Path(__file__).parents[1] / "benchmarks" / "compile_report.md"
HEAD = f"""# What the GPU kernels take

Written by `tools/compile_report.py` (torch {torch.__version__}, Triton {triton.__version__}), from machine code
(sm_80: A100, sm_90: H100, sm_100: B200). **Compiled, not run.** A cell holds registers per thread x threads per
program, shared memory in KiB, and the opcode that feeds the tensor cores (none: the kernel multiplies no matrices);
"spills" would name local memory. Launches that differ in nothing the compiler sees are listed once.
`tests/ops/test_kernel_budgets.py` asserts the budgets.
"""


def rows(case: Case, architectures: Sequence[int]) -> Iterator[str]:
    """Compile one case, and return a table row per kernel."""
    for launch in case.launches():
        cells = [cell(compiled(launch, arch)) if arch in case.architectures else "-" for arch in architectures]
        yield f"| {case.name} | {launch.name} | {' | '.join(cells)} |"


def cell(found: Compiled) -> str:
    """Return the figures of one kernel on one architecture."""
    spills = f" **spills {found.stack} B**" if found.stack or found.local else ""
    shared = f"{found.shared / 1024:.0f} KiB"
    return (
        f"{found.registers} x {found.threads}, {shared}{', ' * bool(found.tensor_core())}{found.tensor_core()}{spills}"
    )


def main() -> None:
    """Write the report for all primitives, or print the tables of those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("primitive", nargs="*", choices=[[], *PRIMITIVES])
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--output", type=Path, default=REPORT)
    arguments = parser.parse_args()
    chosen, architectures = arguments.primitive, arguments.arch
    text = [HEAD]
    for primitive in chosen or PRIMITIVES:
        columns = " | ".join(f"sm_{arch}" for arch in architectures)
        text.append(f"\n## {primitive}\n\n| what | kernel | {columns} |\n|---|---|{'---|' * len(architectures)}")
        for case in PRIMITIVES[primitive]():
            for row in rows(case, architectures):
                print(row, flush=True)
                text.append(row)
    if not chosen:
        write_atomically(arguments.output, "\n".join(text) + "\n")
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
