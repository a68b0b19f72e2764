"""vitrify: turn a pre-trained Vision Transformer into one that multiplies less, then prove and run the result.

The public names load lazily: `import vitrify` costs little more than `import torch`, and touches neither timm nor
matplotlib.

>>> import timm, vitrify
>>> model = timm.create_model("deit_tiny_patch16_224")
>>> conversion = vitrify.convert_(model, vitrify.recipes.vitality())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrify import nn, ops, recipes
    from vitrify.accelerator.explore import explore
    from vitrify.accelerator.simulate import simulate
    from vitrify.artefact import create_model, export_onnx, load, save
    from vitrify.convert import AttentionSpec, Conversion, LinearSpec, Recipe, convert_, pack_
    from vitrify.cost.energy import energy
    from vitrify.cost.explain import explain
    from vitrify.cost.latency import latency
    from vitrify.cost.workload import Workload, workload
    from vitrify.errors import InputError, UnsupportedError, VitrifyError
    from vitrify.tvm import export_tvm

__version__ = "0.1.0"

# name -> the module it lives in; a name equal to its module's last part is the module itself.
_PUBLIC = {
    "AttentionSpec": "vitrify.convert",
    "Conversion": "vitrify.convert",
    "InputError": "vitrify.errors",
    "LinearSpec": "vitrify.convert",
    "Recipe": "vitrify.convert",
    "UnsupportedError": "vitrify.errors",
    "VitrifyError": "vitrify.errors",
    "Workload": "vitrify.cost.workload",
    "convert_": "vitrify.convert",
    "create_model": "vitrify.artefact",
    "energy": "vitrify.cost.energy",
    "explain": "vitrify.cost.explain",
    "explore": "vitrify.accelerator.explore",
    "export_onnx": "vitrify.artefact",
    "export_tvm": "vitrify.tvm",
    "latency": "vitrify.cost.latency",
    "load": "vitrify.artefact",
    "nn": "vitrify.nn",
    "ops": "vitrify.ops",
    "pack_": "vitrify.convert",
    "recipes": "vitrify.recipes",
    "save": "vitrify.artefact",
    "simulate": "vitrify.accelerator.simulate",
    "workload": "vitrify.cost.workload",
}

__all__ = [
    "AttentionSpec",
    "Conversion",
    "InputError",
    "LinearSpec",
    "Recipe",
    "UnsupportedError",
    "VitrifyError",
    "Workload",
    "convert_",
    "create_model",
    "energy",
    "explain",
    "explore",
    "export_onnx",
    "export_tvm",
    "latency",
    "load",
    "nn",
    "ops",
    "pack_",
    "recipes",
    "save",
    "simulate",
    "workload",
]


def __getattr__(name: str) -> Any:
    try:
        module_name = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'vitrify' has no attribute {name!r}") from None
    module = importlib.import_module(module_name)
    value = module if module_name == f"vitrify.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
