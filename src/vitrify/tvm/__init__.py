"""Compilation by TVM, as ShiftAddViT does it: a converted model as one library, with MatAdd and MatShift in it.

Everything but this file needs the extra `tvm`. README.md says what was compiled, checked and measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from vitrify.errors import InputError, optional, unknown


def export_tvm(
    model: nn.Module,
    path: str | Path,
    *,
    target: Literal["llvm", "cuda"] = "llvm",
    batch: int = 1,
    input_size: tuple[int, int, int] | None = None,
) -> float | None:
    """Compile `model` for float32 images (batch, channels, height, width) into a library; return its error.

    A copy is compiled: in eval mode, on the CPU, in float32, its shift layers packed. Linear Hamming attention becomes
    MatAdd, shift layers MatShift; a mixture runs both experts on every token, and so saves nothing.
    target: "llvm", for this machine's CPU; or "cuda", whose kernels are also written as source, to `path` with the
    suffix .cu, and are compiled when the library is loaded, on a GPU of the same kind as this machine's, or from
    compute capability 8.0 on if it has none.
    batch: images per call; the library takes no other number. input_size: as in `export_onnx`.
    The library is run from its file. The error returned is the largest difference to PyTorch, relative to the largest
    output; None for "cuda" where there is no GPU, and then nothing was run.

    Raises InputError for arguments or without the extra `tvm`; VitrifyError without a C++ compiler, or where TVM
    cannot compile the model or disagrees with PyTorch. Then no file is left.
    """
    with optional("tvm", "tvm", "compiling with TVM"):
        import tvm  # noqa: F401, PLC0415
    from vitrify.tvm.export import export  # noqa: PLC0415

    if target not in ("llvm", "cuda"):
        raise unknown("TVM target", str(target), ("llvm", "cuda"))
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch must be a whole number of images from 1 on, not {batch!r}")
    return export(model, Path(path), target, batch, input_size)


__all__ = ["export_tvm"]
