"""Autocast around the ops: whether it is on, and how an op keeps its sums out of it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def under_autocast(tensor: Tensor) -> bool:
    """Say whether autocast is on for the device of `tensor`; the meta device has none, and PyTorch raises if asked."""
    return tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which autocast leaves float32 sums alone; costs nothing where autocast is off."""
    if under_autocast(tensor):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()
