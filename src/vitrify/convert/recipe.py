"""Recipes: which attention goes where, as frozen dataclasses that YAML and JSON carry."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from vitrify.errors import InputError, unknown


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as the number that it is in JSON and in YAML 1.2; YAML 1.1, and so PyYAML, wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

CoreName = Literal["softmax", "taylor", "taylor_sparse", "sparse"]
BiasRule = Literal["carry", "drop"]


@dataclass(frozen=True)
class AttentionSpec:
    """What one attention module becomes.

    core        "softmax" (as it was), "taylor", "taylor_sparse" (Taylor, plus a sparse part in training) or
                "sparse" (softmax over predicted entries: a baseline)
    squares     add the squares of the second-order term; core "taylor" only
    value_conv  kernel size (odd) of a depth-wise convolution on V; 0 for none
    threshold   predicted probability from which the sparse part keeps an entry; n tokens attend uniformly with 1/n
    bits        width of the predictor
    bias        a bias on the logits (LeViT): "carry" it as a token-mixing term, at n^2 d_v, or "drop" it
    """

    core: CoreName = "softmax"
    squares: bool = False
    value_conv: int = 0
    threshold: float = 0.02
    bits: int = 4
    bias: BiasRule = "carry"

    def __post_init__(self) -> None:
        if self.core not in get_args(CoreName):
            raise unknown("attention.core", str(self.core), get_args(CoreName))
        if self.bias not in get_args(BiasRule):
            raise unknown("attention.bias", str(self.bias), get_args(BiasRule))
        if not isinstance(self.squares, bool):
            raise InputError(f"attention.squares must be true or false, not {self.squares!r}")
        if self.squares and self.core != "taylor":
            raise InputError(f"attention.squares needs attention.core 'taylor', not {self.core!r}")
        if not _is_int(self.value_conv) or self.value_conv < 0 or (self.value_conv > 0 and self.value_conv % 2 == 0):
            raise InputError(f"attention.value_conv must be an odd kernel size, or 0 for none, not {self.value_conv!r}")
        if not isinstance(self.threshold, (int, float)) or isinstance(self.threshold, bool):
            raise InputError(f"attention.threshold must be a number in [0, 1], not {self.threshold!r}")
        if not 0 <= self.threshold <= 1:
            raise InputError(f"attention.threshold must be in [0, 1], not {self.threshold}")
        if not _is_int(self.bits) or not 2 <= self.bits <= 16:
            raise InputError(f"attention.bits must be an integer from 2 to 16, not {self.bits!r}")

    def __str__(self) -> str:
        parts: list[str] = [self.core]
        if self.core in ("taylor_sparse", "sparse"):
            parts.append(f"threshold {self.threshold:g}, {self.bits} bits")
        if self.squares:
            parts.append("with squares")
        if self.value_conv:
            parts.append(f"value_conv {self.value_conv}x{self.value_conv}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Recipe:
    """What a model becomes: one spec for every attention module, and exceptions by name.

    attention          the spec of every module that no pattern names; a str is short for AttentionSpec(core=...)
    modules            pattern (fnmatch, on the qualified name) -> spec; of the patterns that match, the last wins
    keep_if_costlier   leave softmax where Taylor would multiply more (few tokens, wide heads)

    >>> recipe = Recipe("mine", attention="taylor", modules={"blocks.0.*": "softmax"})
    >>> recipe.spec_for("blocks.0.attn").core, recipe.spec_for("blocks.1.attn").core
    ('softmax', 'taylor')
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    name: str = "custom"
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    modules: Mapping[str, AttentionSpec] = field(default_factory=dict)
    keep_if_costlier: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"name must be a non-empty string, not {self.name!r}")
        if not isinstance(self.keep_if_costlier, bool):
            raise InputError(f"keep_if_costlier must be true or false, not {self.keep_if_costlier!r}")
        if not isinstance(self.modules, Mapping):
            raise InputError(f"modules must map patterns to specs, not {self.modules!r}")
        # Frozen: the only way to write the coerced values.
        object.__setattr__(self, "attention", _spec(self.attention, "attention"))
        # A plain dict, so that a model carrying its recipe can be deep-copied.
        modules = {_pattern(pattern): _spec(spec, f"modules[{pattern!r}]") for pattern, spec in self.modules.items()}
        object.__setattr__(self, "modules", modules)

    def __hash__(self) -> int:
        return hash((self.name, self.attention, frozenset(self.modules.items()), self.keep_if_costlier))

    def spec_for(self, name: str) -> AttentionSpec:
        """Return the spec of the module with that qualified name."""
        matching = [spec for pattern, spec in self.modules.items() if self.names_module(pattern, name)]
        return matching[-1] if matching else self.attention

    @staticmethod
    def names_module(pattern: str, name: str) -> bool:
        """Return whether a pattern of `modules` matches that qualified name."""
        return fnmatch.fnmatchcase(name, pattern)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for YAML or JSON; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that plain data describes; raises InputError naming the field that is wrong."""
        if not isinstance(data, Mapping):
            raise InputError(f"a recipe must be a mapping with the keys {', '.join(_names(cls))}, not {data!r}")
        _check_keys(data, cls, "recipe key")
        return cls(**data)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML or JSON file; a file without `name` gives its own."""
        path = Path(path)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
        except FileNotFoundError:
            raise InputError(f"recipe file {str(path)!r} does not exist") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"recipe file {str(path)!r} cannot be read: {error}") from error
        try:
            return cls.from_dict({"name": path.stem, **data} if isinstance(data, Mapping) else data)
        except InputError as error:
            raise InputError(f"recipe file {str(path)!r}: {error}") from error

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe to a file: JSON if it ends in .json, else YAML."""
        path = Path(path)
        data = self.to_dict()
        text = json.dumps(data, indent=2) + "\n" if path.suffix == ".json" else yaml.safe_dump(data, sort_keys=False)
        path.write_text(text, encoding="utf-8")


def _spec(value: Any, where: str) -> AttentionSpec:
    if isinstance(value, AttentionSpec):
        return value
    if isinstance(value, str):
        value = {"core": value}
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a core's name or a mapping, not {value!r}")
    _check_keys(value, AttentionSpec, f"key in {where}")
    try:
        return AttentionSpec(**value)
    except InputError as error:
        # The spec calls itself "attention"; inside `modules` say which one.
        raise InputError(str(error).replace("attention.", f"{where}.")) from None


def _check_keys(data: Mapping[Any, Any], cls: type, kind: str) -> None:
    for key in data:
        if key not in _names(cls):
            raise unknown(kind, str(key), _names(cls))


def _names(cls: Any) -> list[str]:
    return [f.name for f in fields(cls)]


def _pattern(pattern: Any) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise InputError(f"modules has the pattern {pattern!r}: a pattern is a non-empty string such as 'blocks.0.*'")
    return pattern


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
