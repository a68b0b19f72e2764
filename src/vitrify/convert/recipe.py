"""Recipes: which primitive goes where, as frozen dataclasses that YAML and JSON carry."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml

from vitrify.convert.specs import ATTENTION, LINEAR, AttentionSpec, CoreName, LinearSpec, Primitive, Spec, is_int
from vitrify.errors import InputError, unknown

S = TypeVar("S", AttentionSpec, LinearSpec)


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as the number that it is in JSON and in YAML 1.2; YAML 1.1, and so PyYAML, wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Recipe:
    """What a model becomes: specs for its attention, the linear layers in and beside it, and exceptions by name.

    attention          the spec of every attention module; a str is short for AttentionSpec(core=...)
    projections        the spec of the linear layers inside attention modules; a str is short for its primitive
    mlp                the spec of the linear layers in the blocks around attention; with "mixture" an MLP that treats
                       each token alone gets one router, otherwise each of its layers has its own
    modules            pattern (fnmatch, on the qualified name) -> spec; of the patterns that match, the last wins.
                       A spec with a core is for attention modules, one with a primitive for linear layers (any in the
                       model), MLPs and convolutions
    keep_if_costlier   leave softmax where Taylor would multiply more (few tokens, wide heads)
    min_tokens         leave attention over fewer keys as it is

    >>> recipe = Recipe("mine", attention="taylor", mlp="shift", modules={"blocks.0.*": "softmax"})
    >>> recipe.spec_for("blocks.0.attn").core, recipe.spec_for("blocks.1.attn").core
    ('softmax', 'taylor')
    >>> Recipe.from_dict(recipe.to_dict()) == recipe
    True
    """

    name: str = "custom"
    attention: AttentionSpec = field(default_factory=AttentionSpec)
    modules: Mapping[str, Spec] = field(default_factory=dict)
    keep_if_costlier: bool = True
    projections: LinearSpec = field(default_factory=LinearSpec)
    mlp: LinearSpec = field(default_factory=LinearSpec)
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"name must be a non-empty string, not {self.name!r}")
        if not isinstance(self.keep_if_costlier, bool):
            raise InputError(f"keep_if_costlier must be true or false, not {self.keep_if_costlier!r}")
        if not is_int(self.min_tokens) or self.min_tokens < 0:
            raise InputError(f"min_tokens must be a whole number of at least 0, not {self.min_tokens!r}")
        if not isinstance(self.modules, Mapping):
            raise InputError(f"modules must map patterns to specs, not {self.modules!r}")
        # Frozen: the only way to write the coerced values.
        object.__setattr__(self, "attention", _read(AttentionSpec, self.attention, "attention"))
        for role in ("projections", "mlp"):
            object.__setattr__(self, role, _read(LinearSpec, getattr(self, role), role))
        # A plain dict, so that a model carrying its recipe can be deep-copied.
        modules = {
            _pattern(pattern): _any_spec(spec, f"modules[{pattern!r}]") for pattern, spec in self.modules.items()
        }
        object.__setattr__(self, "modules", modules)

    def __hash__(self) -> int:
        rules = (self.attention, self.projections, self.mlp, self.keep_if_costlier, self.min_tokens)
        return hash((self.name, rules, frozenset(self.modules.items())))

    def spec_for(self, name: str) -> AttentionSpec:
        """Return the spec of the attention module with that qualified name."""
        return self._last_match(AttentionSpec, name) or self.attention

    def linear_spec_for(self, name: str, default: LinearSpec) -> LinearSpec:
        """Return the spec of the linear layer, MLP or convolution with that name; `default` if no pattern names it."""
        return self._last_match(LinearSpec, name) or default

    def _last_match(self, kind: type[S], name: str) -> S | None:
        patterns = ((p, s) for p, s in self.modules.items() if isinstance(s, kind))
        matching = [spec for pattern, spec in patterns if self.names_module(pattern, name)]
        return matching[-1] if matching else None

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
        data = read_yaml(path, "recipe file")
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


def read_yaml(path: Path, what: str) -> Any:
    """Return the plain data in a YAML or JSON file; raises InputError naming the file, called `what`."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except FileNotFoundError:
        raise InputError(f"{what} {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{what} {str(path)!r} cannot be read: {error}") from error


def _any_spec(value: Any, where: str) -> Spec:
    """Read a spec of either kind: by its name, or by which kind its keys belong to."""
    if isinstance(value, str):
        if value not in (*get_args(CoreName), *get_args(Primitive)):
            raise unknown(where, value, [*get_args(CoreName), *get_args(Primitive)])
        linear = value in get_args(Primitive)
    else:
        linear = isinstance(value, LinearSpec) or (isinstance(value, Mapping) and "primitive" in value)
    return _read(LinearSpec, value, where) if linear else _read(AttentionSpec, value, where)


def _read(kind: type[S], value: Any, where: str) -> S:
    short, own_name = ("core", ATTENTION) if kind is AttentionSpec else ("primitive", LINEAR)
    if isinstance(value, kind):
        return value
    if isinstance(value, str):
        value = {short: value}
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a {short}'s name or a mapping, not {value!r}")
    _check_keys(value, kind, f"key in {where}")
    try:
        return kind(**value)
    except InputError as error:
        # The spec calls itself by its kind; say which one of the recipe it is.
        raise InputError(str(error).replace(f"{own_name}.", f"{where}.")) from None


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
