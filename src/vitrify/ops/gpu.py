"""Where the Triton kernels run, found out without importing Triton: it is optional, and takes a second to import."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

INSTALLED = importlib.util.find_spec("triton") is not None


def available(device: torch.device) -> bool:
    """Say whether the kernels take tensors on `device`: an NVIDIA GPU of compute capability 8.0, with Triton installed.

    A process without any GPU is told what one of that kind would do.
    """
    if device.type != "cuda" or torch.version.hip is not None or not INSTALLED:
        return False
    # The properties, not get_device_capability: torch.compile knows them as constants.
    return not torch.cuda.is_available() or torch.cuda.get_device_properties(device).major >= 8


def converts_e4m3(device: torch.device) -> bool:
    """Say whether the GPU `device` has instructions that round to E4M3, without which Triton does not."""
    if not torch.cuda.is_available():
        return True
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor) >= (8, 9)


def interpreting() -> bool:
    """Say whether Triton interprets its kernels, on tensors of any device."""
    return INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def kernels(module: str) -> ModuleType:
    """Return a module with kernels by its name below `vitrify.ops`: "taylor.triton". The first call imports Triton."""
    return importlib.import_module(f"vitrify.ops.{module}")
