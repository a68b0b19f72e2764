"""Compile a Relax module for a CPU or for CUDA, and run what was compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import tvm
from torch import Tensor
from tvm import relax
from tvm.s_tir import dlight
from tvm.target.codegen import llvm_get_system_cpu

from vitrify.tvm import schedules

TargetName = Literal["llvm", "cuda"]

# The oldest GPU that the CUDA source is scheduled for, where there is none to ask.
ARCHITECTURE = "sm_80"


def target(name: TargetName) -> tvm.target.Target:
    """Return "llvm" with all that this machine's CPU can do, or "cuda": this machine's GPU, or Ampere and later."""
    host = {"kind": "llvm", "mcpu": llvm_get_system_cpu()}
    if name == "llvm":
        return tvm.target.Target(host)
    gpu = tvm.cuda()
    architecture = f"sm_{gpu.compute_version.replace('.', '')}" if gpu.exist else ARCHITECTURE
    return tvm.target.Target({"kind": "cuda", "arch": architecture}, host=host)


def runs_here(name: TargetName) -> bool:
    """Say whether this machine can run what is compiled for the target."""
    return name == "llvm" or bool(tvm.cuda().exist)


def compile_module(module: tvm.IRModule, to: tvm.target.Target) -> relax.VMExecutable:
    """Return the module compiled: operators fused, weights' layouts folded, every loop nest scheduled by our rules."""
    with to:
        fused = relax.get_pipeline("zero")(module)
        scheduled = dlight.ApplyDefaultSchedule(*schedules.rules(to))(fused)
        return tvm.compile(scheduled, to, relax_pipeline=relax.get_pipeline("default_build"))


def cuda_source(executable: relax.VMExecutable) -> str:
    """Return the CUDA source of all kernels; empty for a library without any."""
    pending, found = [executable.mod], []
    while pending:
        module = pending.pop()
        pending.extend(module.imports)
        if module.kind == "cuda":
            found.append(module.inspect_source())
    return "\n".join(found)


def run(library: Path, images: Tensor, name: TargetName) -> Tensor:
    """Load the library from its file and return its output for float32 images."""
    device = tvm.cuda() if name == "cuda" else tvm.cpu()
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(library)), device)
    output = machine["main"](tvm.runtime.tensor(images.numpy(), device))
    return torch.from_numpy(output.numpy())
