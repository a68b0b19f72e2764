"""Conversion: recipes, `convert_`, and one adapter per attention class.

>>> import timm
>>> from vitrify.convert import Recipe, convert_
>>> conversion = convert_(timm.create_model("deit_tiny_patch16_224"), Recipe("mine", "taylor"))
>>> len(conversion.changed), conversion.changed[0].name
(12, 'blocks.0.attn')
"""

from vitrify.convert.conversion import Change, Conversion
from vitrify.convert.convert import convert_
from vitrify.convert.linears import pack_
from vitrify.convert.recipe import Recipe
from vitrify.convert.specs import AttentionSpec, LinearSpec

__all__ = ["AttentionSpec", "Change", "Conversion", "LinearSpec", "Recipe", "convert_", "pack_"]
