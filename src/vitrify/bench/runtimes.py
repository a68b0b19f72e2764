"""What one would run instead of converting a model: other runtimes, and their 8-bit integers, on a CPU.

Each is made at its first call: an export takes seconds to minutes, and the memory measurement wants one of them only.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]
TORCH_INT8, ORT, ORT_INT8, OPENVINO = "torch dynamic INT8", "ONNX Runtime", "ONNX Runtime dynamic INT8", "OpenVINO"


def runtimes(model: nn.Module, example: Tensor) -> tuple[dict[str, Model], dict[str, str]]:
    """Return (models by the name of what runs them, why the others are not run) for images of the example's shape.

    They use as many threads as torch does.
    """
    if example.device.type != "cpu":
        return {}, {"TensorRT": "vitrify has no exporter for it"}
    found: dict[str, Model] = {TORCH_INT8: _lazily(lambda: _torch_int8(model))}
    not_run = {}
    folder = cache(tempfile.TemporaryDirectory)  # goes with the closures that hold it

    @cache
    def onnx_file() -> Path:
        path = Path(folder().name) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            torch.onnx.export(model, (example,), path, dynamo=True, verbose=False, external_data=False)
        return path

    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    for names, package, make in (
        ((ORT, ORT_INT8), "onnxruntime", _onnx_runtime),
        ((OPENVINO,), "openvino", _openvino),
    ):
        absent = [*missing, *([package] if importlib.util.find_spec(package) is None else [])]
        for name in names:
            if absent:
                not_run[name] = f"{', '.join(absent)} not installed"
            else:
                found[name] = _lazily(partial(make, onnx_file, name))
    return found, not_run


def _lazily(make: Callable[[], Model]) -> Model:
    made = cache(make)

    def run(images: Tensor) -> Tensor:
        return made()(images)

    return run


def _torch_int8(model: nn.Module) -> Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated, and the only one in torch itself
        quantize_dynamic: Any = torch.ao.quantization.quantize_dynamic
        quantised: Model = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return quantised


def _onnx_runtime(file: Callable[[], Path], name: str) -> Model:
    runtime: Any = importlib.import_module("onnxruntime")
    path = _quantise(file()) if name == ORT_INT8 else file()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    argument = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {argument: images.numpy()})[0])


def _quantise(path: Path) -> Path:
    onnx: Any = importlib.import_module("onnx")
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    plain, quantised = path.with_name("plain.onnx"), path.with_name("int8.onnx")
    model = onnx.load(path)
    # Shapes that the exporter noted, and that quantisation finds at odds with its own layout of the weights.
    del model.graph.value_info[:]
    onnx.save(model, plain)
    quantization.quantize_dynamic(plain, quantised, op_types_to_quantize=["MatMul", "Gemm"])
    return quantised


def _openvino(file: Callable[[], Path], name: str) -> Model:
    openvino: Any = importlib.import_module("openvino")
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(file(), "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])
