"""Export to ONNX, with the batch free, checked in ONNX Runtime before the file takes its name."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.artefact.builders import input_config
from vitrify.convert import pack_
from vitrify.errors import VitrifyError, optional

# Of the largest output. Two float32 runtimes differ by the order of their sums; a code, or a rounded activation, flips
# where a value lies within that of its threshold, and takes a whole product with it.
TOLERANCE, TOLERANCE_WITH_CODES = 1e-4, 1e-2


def export_onnx(model: nn.Module, path: str | Path, *, input_size: tuple[int, int, int] | None = None) -> float:
    """Write `model` as an ONNX file for float32 images (batch, channels, height, width), any batch; return its error.

    A copy is exported: in eval mode, on the CPU, in float32, its shift layers packed, its ops as plain operators.
    input_size: (channels, height, width) of the images, by default the model's own; the file takes no other.
    The file is run in ONNX Runtime on random images of another batch size than it was traced with. The error returned
    is the largest difference to PyTorch, relative to the largest output.

    Raises InputError without the extra `onnx`; VitrifyError where PyTorch cannot export the model, or ONNX Runtime
    disagrees with it. Then no file is left.
    """
    with optional("onnxscript", "onnx", "exporting to ONNX"):
        import onnxscript  # noqa: F401, PLC0415
    with optional("onnxruntime", "onnx", "checking an ONNX file"):
        import onnxruntime  # noqa: PLC0415

    path = Path(path)
    exported = copy.deepcopy(model).cpu().float().eval()
    pack_(exported)
    size = input_config(model)["input_size"] if input_size is None else input_size
    generator = torch.Generator().manual_seed(0)
    traced, tried = (torch.randn(batch, *size, generator=generator) for batch in (2, 3))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        _write(exported, traced, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = session.run(None, {session.get_inputs()[0].name: tried.numpy()})
        with torch.no_grad():
            expected = first_tensor(exported(tried))
        error = ((torch.from_numpy(outputs[0]) - expected).abs().max() / expected.abs().max()).item()
        tolerance = tolerance_for(model)
        if not error <= tolerance:
            raise VitrifyError(f"ONNX Runtime's outputs differ from PyTorch's by {error:.1e}, more than {tolerance:g}")
        for part in Path(folder).iterdir():  # above 2 GB the weights lie in a file of their own
            part.replace(path.parent / part.name)
    return error


def _write(model: nn.Module, images: Tensor, file: Path) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        # The exporter reports its progress on stdout, and warns about what it works around.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model, (images,), input_names=["images"], dynamo=True, dynamic_shapes=shapes, verbose=False
            )
        program.save(file)
    except Exception as error:  # any model may be given, and the exporter may fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VitrifyError(f"PyTorch cannot export {type(model).__name__} to ONNX: {reason}") from error


def tolerance_for(model: nn.Module) -> float:
    """Return the error that another float32 runtime may have, relative to the largest output."""
    conversion = getattr(model, "_vitrify", None)
    applied = () if conversion is None else conversion.applied.values()
    coded = any(
        getattr(spec, "core", None) == "hamming" or getattr(spec, "activations", "float") != "float" for spec in applied
    )
    return TOLERANCE_WITH_CODES if coded else TOLERANCE


def first_tensor(output: Any) -> Tensor:
    """Return the first tensor of what a model returns: a tensor, a tuple, or a Hugging Face output."""
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
