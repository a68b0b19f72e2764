"""Makes a public op a leaf for torch.fx: the traced graph holds one call of the op, whoever calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

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
