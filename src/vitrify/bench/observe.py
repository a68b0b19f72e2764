"""Watch every attention core while a converted model runs: its queries, keys and values, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.nn import CoreAttention, ValueConv
from vitrify.nn.attention import named_cores
from vitrify.nn.cores import Core

__all__ = ["attention_multiplications", "core_multiplications", "named_cores", "observe_cores"]

Observer = Callable[[Core, tuple[Any, ...], dict[str, Any]], None]


@contextmanager
def observe_cores(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer(core, args, kwargs)` before every core's forward; args start with query, key and value."""
    handles = [core.register_forward_pre_hook(observer, with_kwargs=True) for core in named_cores(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def core_multiplications(core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the multiplications of one observed call in eval mode, over batch and heads (docs/papers.md 2)."""
    query, key, value = args[:3]
    batch, heads, queries, width = query.shape
    biased = kwargs.get("bias") is not None
    return int(batch * heads * core.multiplications(queries, key.shape[2], width, value.shape[3], biased=biased))


@torch.no_grad()
def attention_multiplications(model: nn.Module, images: Tensor) -> int:
    """Return the multiplications per image in the attention of a converted model: its cores and value_convs, as run."""
    total = 0
    attentions = {m.core: m for m in model.modules() if isinstance(m, CoreAttention)}

    def count(core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal total
        total += core_multiplications(core, args, kwargs)
        convolution = attentions[core].value_conv
        if convolution is not None:
            batch, heads, tokens, width = args[2].shape
            kernel_size = convolution.conv.kernel_size
            total += batch * heads * ValueConv.multiplications(kernel_size, tokens, width)

    with observe_cores(model, count):
        model(images)
    return total // len(images)
