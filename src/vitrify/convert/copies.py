"""Copies of modules to try things on, so that the user's model is neither run nor changed by a trial."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrify.nn.copying import copy_without_hooks, empty_hooks

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")


def detached_copy(module: M) -> M:
    """Return a deep copy without hooks and without autograd history; meta parameters become (empty) CPU ones."""
    memo = empty_hooks(module)
    for tensor in _stray_tensors(module):
        memo[id(tensor)] = tensor.detach().clone()
    duplicate = copy.deepcopy(module, memo)
    if any(p.is_meta for p in duplicate.parameters()):
        duplicate.to_empty(device="cpu")
        for child in duplicate.modules():
            # timm's way to fill index tables, which `to_empty` leaves at whatever was in memory.
            refill = getattr(child, "init_non_persistent_buffers", None)
            if refill is not None:
                refill()
    return duplicate


def on_shapes(module: nn.Module, run: Callable[[FakeTensorMode | None], R]) -> R:
    """Return `run(mode)`, with the mode under which a `shape_copy` of `module` is to run: fake tensors, or none.

    On the meta device a model's own tensors have shapes alone, and run several times faster than fake ones. Where that
    fails, fake tensors have the last word: they say whether the model depends on values.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and all(tensor.is_meta for tensor in tensors):
        with suppress(Exception):  # any model may be given, and may fail in any way
            return run(None)
    with _quietly():
        return run(FakeTensorMode(allow_non_fake_inputs=True))


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep fake tensors from logging, with its traceback, the error that is raised anyway."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def shape_copy(module: M, mode: FakeTensorMode | None) -> M:
    """Return a deep copy without hooks or memory: on fake tensors, or, without a mode, as it is on the meta device."""
    if mode is None:
        return copy_without_hooks(module)
    memo = empty_hooks(module)
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.detach()), requires_grad=False)
    for tensor in [*module.buffers(), *_stray_tensors(module)]:
        memo[id(tensor)] = mode.from_tensor(tensor.detach())
    return copy.deepcopy(module, memo)


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill every floating-point parameter and buffer with random numbers that keep activations near unit size."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            # Matrices by their fan-in; vectors (norm weights, biases, layer scales) around one.
            noise = noise / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1 + noise / 2
            parameter.copy_(noise)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            # Positive: running variances are among them.
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)


def _stray_tensors(module: nn.Module) -> list[Tensor]:
    """Return tensors held as plain attributes or in dicts (caches), which deepcopy refuses if they have history."""
    found: list[Tensor] = []
    registered = {id(t) for t in [*module.parameters(), *module.buffers()]}
    for child in module.modules():
        for value in child.__dict__.values():
            values = value.values() if isinstance(value, dict) else [value]
            found += [v for v in values if isinstance(v, Tensor) and id(v) not in registered]
    return found
