"""Deep copies of modules without the hooks that users hung on the original."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def copy_without_hooks(module: M) -> M:
    """Return a deep copy whose hook tables are empty: a hook would fire twice, and what it is bound to be copied."""
    return copy.deepcopy(module, empty_hooks(module))


def empty_hooks(module: nn.Module) -> dict[int, Any]:
    """Return a deepcopy memo that replaces every hook table in `module` by an empty one."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        for name in _HOOKS:
            if name in child.__dict__:
                memo[id(child.__dict__[name])] = OrderedDict()
    return memo
