"""The named recipes: `vitrify.recipes.vitality()`; an alias of `vitrify.convert.recipes`."""

from vitrify.convert.recipes import get, names, softmax, sparse, taylor, vitality

__all__ = ["get", "names", "softmax", "sparse", "taylor", "vitality"]
