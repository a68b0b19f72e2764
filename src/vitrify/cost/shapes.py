"""A copy of a model that has its shapes and none of its memory, and still knows its token grid."""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrify.convert.copies import shape_copy
from vitrify.nn import TokenGrid


def copy_of_shapes(model: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """Return a `shape_copy` in eval mode, with no hooks but those that tell convolutions on V the grid."""
    copy = shape_copy(model, mode)
    pairs = list(zip(model.modules(), copy.modules(), strict=True))
    grids = {id(getattr(old, "token_grid", None)): getattr(new, "token_grid", None) for old, new in pairs}
    for old, new in pairs:
        new.training = False  # not .eval(): sources override train()
        for number, hook in old._forward_pre_hooks.items():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, TokenGrid) and id(owner) in grids:
                watch = getattr(grids[id(owner)], hook.__name__)
                new.register_forward_pre_hook(watch, with_kwargs=number in old._forward_pre_hooks_with_kwargs)
    return copy
