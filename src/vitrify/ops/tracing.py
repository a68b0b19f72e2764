"""What the ops do while a graph is recorded: they are leaves for torch.fx, and plain ATen calls in an export."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.fx import Proxy

P = ParamSpec("P")
R = TypeVar("R")


def fx_leaf(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, recorded as a single `call_function` node when it is called with a torch.fx proxy.

    `torch.fx.wrap` patches the names of one module only, so every caller would have to repeat it; shape checks would
    otherwise branch on proxies and break the trace.
    """

    @functools.wraps(function)
    def leaf(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Proxy):
                return argument.tracer.create_proxy("call_function", leaf, args, kwargs)
        return function(*args, **kwargs)

    return cast("Callable[P, R]", leaf)


def exporting(x: Tensor | Proxy | None = None) -> bool:
    """Say whether a graph to keep is recorded (export, ONNX, jit.trace), or `x` is torch.fx's: for plain ATen calls."""
    # Dynamo 2.11 takes is_exporting() for True whatever it traces for, and cannot trace torch._C._is_tracing().
    return (
        isinstance(x, Proxy)
        or torch.compiler._is_exporting_flag
        or torch._C._get_tracing_state() is not None
        or torch.onnx.is_in_onnx_export()
    )
