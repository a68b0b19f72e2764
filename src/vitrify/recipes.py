"""The named recipes: `vitrify.recipes.vitality()`; an alias of `vitrify.convert.recipes`."""

from vitrify.convert.recipes import get, names, shiftaddvit, softmax, sparse, taylor, vitality, vitrify

__all__ = ["get", "names", "shiftaddvit", "softmax", "sparse", "taylor", "vitality", "vitrify"]
