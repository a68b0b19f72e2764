"""Modules of a known class that somebody has changed: refused with the reason, while the others convert."""

import functools

import pytest
import torch
from convert_helpers import attention_names, vit
from timm.layers.attention import Attention
from torch import nn

from vitrify import recipes
from vitrify.convert import convert_
from vitrify.errors import InputError


def test_a_forward_on_the_instance_is_refused():
    """As accelerate's add_hook_to_module leaves it: the instance's attribute hides whatever class it gets."""
    model = vit()
    attention = model.blocks[0].attn
    attention.forward = functools.partial(type(attention).forward, attention)
    conversion = convert_(model, recipes.taylor())
    assert attention_names(conversion) == ["blocks.1.attn"]
    assert [change.name for change in conversion.refused] == ["blocks.0.attn"]
    assert "`forward` of its own" in conversion.refused[0].detail
    assert type(attention) is Attention


def test_replaced_children_are_refused_and_other_layers_convert():
    model, x = vit(depth=4), torch.randn(2, 3, 32, 32)
    model.blocks[0].attn.qkv = nn.Sequential(model.blocks[0].attn.qkv)
    model.blocks[1].attn.attn_drop = nn.Identity()
    for parameter in model.blocks[2].attn.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.to(torch.int8)
    conversion = convert_(model, recipes.taylor())
    reasons = {change.name: change.detail for change in conversion.refused}
    assert reasons.keys() == {"blocks.0.attn", "blocks.1.attn", "blocks.2.attn"}
    assert "in_features" in reasons["blocks.0.attn"]
    assert "Identity" in reasons["blocks.1.attn"]
    assert attention_names(conversion) == ["blocks.3.attn"]
    model.blocks = model.blocks[:2] + model.blocks[3:]
    assert model(x).isfinite().all()


@pytest.mark.parametrize(("wrap", "inner"), [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_wrappers_are_not_converted(wrap, inner):
    wrapper = wrap(vit())
    with pytest.raises(InputError, match=rf"{type(wrapper).__name__} wraps the model: .*\.{inner}"):
        convert_(wrapper, recipes.taylor())
    assert type(getattr(wrapper, inner).blocks[0].attn) is Attention
