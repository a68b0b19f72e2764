"""Artefacts: a model that remembers how it was built and converted, written to a folder and read back bit for bit.

- `create_model`: build a timm or Hugging Face model by name, and remember how.
- `save`, `load`: the artefact folder (`model.safetensors`, `recipe.json`, `config.json`).
- `export_onnx`: an ONNX file, checked in ONNX Runtime.
- `input_config`: the image size and normalisation a model expects.
- `read_checkpoint`, `load_weights`: other people's checkpoints, without ever running pickle code.
"""

from __future__ import annotations

from vitrify.artefact.builders import create_model, input_config, is_plain, mark_trained, rebuild_original
from vitrify.artefact.checkpoints import load_weights, read_checkpoint
from vitrify.artefact.folder import check_target, is_artefact, load, save
from vitrify.artefact.onnx import export_onnx

__all__ = [
    "check_target",
    "create_model",
    "export_onnx",
    "input_config",
    "is_artefact",
    "is_plain",
    "load",
    "load_weights",
    "mark_trained",
    "read_checkpoint",
    "rebuild_original",
    "save",
]
