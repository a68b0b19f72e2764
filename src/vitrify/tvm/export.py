"""Export to a TVM library, run from its file before the file takes its name."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tvm.support import cc

from vitrify.artefact import input_config
from vitrify.artefact.onnx import first_tensor, tolerance_for
from vitrify.convert import pack_
from vitrify.errors import VitrifyError
from vitrify.tvm import build, frontend


def export(
    model: nn.Module, path: Path, target: build.TargetName, batch: int, input_size: tuple[int, int, int] | None
) -> float | None:
    """See `vitrify.tvm.export_tvm`, which checks the arguments."""
    if cc.get_cc() is None:  # TVM would fail at the very end, and not say why
        raise VitrifyError("TVM links a library by a C++ compiler, and finds none: install g++ or clang++, or set CXX")
    compiled = copy.deepcopy(model).cpu().float().eval()
    pack_(compiled)
    size = input_config(model)["input_size"] if input_size is None else input_size
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = first_tensor(compiled(images))
    to = build.target(target)
    try:
        with _quiet():
            executable = build.compile_module(frontend.relax_module(compiled, images), to)
    except VitrifyError:
        raise
    except Exception as failure:  # any model may be given, and the exporters may fail in any way
        reason = next(iter(str(failure).splitlines()), type(failure).__name__)
        raise VitrifyError(f"TVM cannot compile {type(model).__name__}: {reason}") from failure
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        with _quiet():
            executable.export_library(str(file))
        if target == "cuda":
            file.with_suffix(".cu").write_text(build.cuda_source(executable))
        error = _check(model, file, images, expected, target) if build.runs_here(target) else None
        for part in Path(folder).iterdir():
            part.replace(path.parent / part.name)
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what TVM's C++ side writes to stderr: a line per constant and more, at no level that could be set."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _check(model: nn.Module, file: Path, images: Tensor, expected: Tensor, target: build.TargetName) -> float:
    error = ((build.run(file, images, target) - expected).abs().max() / expected.abs().max()).item()
    tolerance = tolerance_for(model)
    if not error <= tolerance:
        raise VitrifyError(f"TVM's outputs differ from PyTorch's by {error:.1e}, more than {tolerance:g}")
    return error
