"""Watch every attention core while a converted model runs: its queries, keys and values, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from vitrify.nn.cores import Core

Observer = Callable[[Core, tuple[Any, ...], dict[str, Any]], None]


def named_cores(model: nn.Module) -> dict[str, Core]:
    """Return the attention cores of a converted model by their names, in the order of the model's modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Core)}


@contextmanager
def observe_cores(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call `observer(core, args, kwargs)` before every core's forward; args start with query, key and value."""
    handles = [core.register_forward_pre_hook(observer, with_kwargs=True) for core in named_cores(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def core_multiplications(core: Core, query: Tensor, key: Tensor, value: Tensor) -> int:
    """Return the multiplications of one call of `core` in eval mode, over batch and heads (docs/papers.md 2).

    Shapes: query (batch, heads, queries, d), key (batch, heads, keys, d), value (batch, heads, keys, d_v).
    """
    batch, heads, queries, width = query.shape
    return batch * heads * core.multiplications(queries, key.shape[2], width, value.shape[3])
