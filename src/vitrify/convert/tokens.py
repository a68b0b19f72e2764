"""What a forward pass does, found by running a shape-only copy of the model: token counts, and the layers it calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrify.convert.adapters.base import Adapter, adopt, like
from vitrify.convert.copies import on_shapes, shape_copy
from vitrify.errors import InputError

InputSize = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """What one attention head computes on: tokens of queries and keys, widths of keys and values."""

    num_queries: int
    num_keys: int
    key_dim: int
    value_dim: int
    has_bias: bool


def default_input_size(model: nn.Module) -> InputSize | None:
    """Return the (channels, height, width) that the model was built for, or None if it does not say.

    The patch embedding's image size comes first, as it knows a changed `img_size`; then a Hugging Face config, then
    timm's `pretrained_cfg`.
    """
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if conv is None:
        return None
    config = getattr(model, "config", None)
    pretrained = getattr(model, "pretrained_cfg", None) or {}
    found = (
        getattr(getattr(model, "patch_embed", None), "img_size", None)
        or getattr(config, "image_size", None)
        or tuple(pretrained.get("input_size", ()))[1:]
    )
    if not found:
        return None
    height, width = (found, found) if isinstance(found, int) else found
    return conv.in_channels, int(height), int(width)


def check_input_size(input_size: Any) -> InputSize:
    """Return the size as a tuple; raise InputError unless it is (channels, height, width)."""
    sizes = tuple(input_size) if isinstance(input_size, (tuple, list)) else ()
    if len(sizes) != 3 or not all(isinstance(s, int) and s > 0 for s in sizes):
        raise InputError(f"input_size must be (channels, height, width), such as (3, 224, 224), not {input_size!r}")
    return sizes[0], sizes[1], sizes[2]


@dataclass(frozen=True)
class Trial:
    """What a trial run saw: the shape of each attention, and the layers that were called (None: it was not run)."""

    shapes: dict[str, Shape] = field(default_factory=dict)
    called: set[str] | None = None


def trial_run(
    model: nn.Module, adapters: Mapping[str, type[Adapter]], layers: Sequence[str], input_size: InputSize | None
) -> Trial:
    """Return what one forward pass of two images does to the named modules; nothing real is run or changed.

    Without an input size the model is called with its own `example_batch()`. Raises whatever the model raises.
    """
    return on_shapes(model, lambda mode: _trial_run(model, adapters, layers, input_size, mode))


def _trial_run(
    model: nn.Module,
    adapters: Mapping[str, type[Adapter]],
    layers: Sequence[str],
    input_size: InputSize | None,
    mode: FakeTensorMode | None,
) -> Trial:
    shapes: dict[str, Shape] = {}
    called: set[str] = set()
    copy = shape_copy(model, mode)
    for child in copy.modules():
        # Not .eval(): sources override train(). Evaluation, because batch norm cannot train on one token.
        child.training = False
    for name, adapter in adapters.items():
        module = copy.get_submodule(name)
        adopt(module, adapter, adapter.softmax_core(module))
        module.core.register_forward_pre_hook(_recorder(shapes, name), with_kwargs=True)  # type: ignore[union-attr]
    for name in layers:
        copy.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name))
    weight = like(model)
    with mode or nullcontext(), torch.no_grad():
        if input_size is None:
            copy(copy.example_batch())  # type: ignore[operator]  # nn.Module's types foresee no such method
        else:
            copy(torch.empty(2, *input_size, dtype=weight.dtype, device=weight.device))
    return Trial(shapes, called)


def _recorder(shapes: dict[str, Shape], name: str) -> Any:
    def record(core: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        query, key, value = args[:3]
        shapes[name] = Shape(query.shape[2], key.shape[2], key.shape[3], value.shape[3], kwargs.get("bias") is not None)

    return record
