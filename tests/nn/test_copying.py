"""Copies never carry hooks, whoever makes them."""

import pytest
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitrify.convert.copies import detached_copy, shape_copy
from vitrify.nn.copying import copy_without_hooks, empty_hooks

REGISTER = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_state_dict_post_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


def hook_tables(module):
    return {name: table for name, table in module.__dict__.items() if "hook" in name and isinstance(table, dict)}


@pytest.fixture
def hooked():
    """A layer inside a container, with a hook of every kind."""
    model = nn.Sequential(nn.Linear(2, 2))
    for register in REGISTER:
        getattr(model[0], register)(lambda *_: None)
    assert sum(map(bool, hook_tables(model[0]).values())) >= len(REGISTER)
    return model


@pytest.mark.parametrize(
    "duplicate", [copy_without_hooks, detached_copy, lambda model: shape_copy(model, FakeTensorMode())]
)
def test_a_copy_has_no_hooks_and_the_original_keeps_its_own(hooked, duplicate):
    before = {name: dict(table) for name, table in hook_tables(hooked[0]).items()}
    copied = duplicate(hooked)
    assert not any(hook_tables(copied[0]).values())
    assert {name: dict(table) for name, table in hook_tables(hooked[0]).items()} == before


def test_each_copied_table_is_its_own(hooked):
    tables = empty_hooks(hooked)
    assert len({id(table) for table in tables.values()}) == len(tables) > len(REGISTER)
