"""Linear layers, MLPs and convolutions: which there are, what the recipe makes of each, and the swap in place."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from vitrify.convert.adapters import qualified_name
from vitrify.convert.adapters.base import OWN_FORWARD
from vitrify.convert.conversion import Change, Conversion
from vitrify.convert.recipe import Recipe
from vitrify.convert.specs import LinearSpec
from vitrify.errors import InputError
from vitrify.nn import ShiftConv2d, ShiftLinear, ValueConv
from vitrify.nn.integer import IntLinear
from vitrify.nn.mixture import Mixture, MixtureLinear, MixtureMlp, mixture_mlp_

OURS = (ShiftLinear, ShiftConv2d, IntLinear, Mixture)
_LINEAR = (nn.Linear, ShiftLinear, IntLinear, MixtureLinear)
_CONV = (nn.Conv2d, ShiftConv2d)

# MLPs that treat each token alone, by exact class: one router can send a token through the whole of them.
_TOKENWISE_MLPS = {
    *("timm.layers.mlp.Mlp", "timm.layers.mlp.GluMlp", "timm.layers.mlp.SwiGLU"),
    *("transformers.models.vit.modeling_vit.ViTMLP", "transformers.models.deit.modeling_deit.DeiTMLP"),
    *("transformers.models.dinov2.modeling_dinov2.Dinov2MLP",),
    *("transformers.models.dinov2.modeling_dinov2.Dinov2SwiGLUFFN",),
    *("transformers.models.siglip.modeling_siglip.SiglipMLP",),
}


def register_mlp(cls: type[nn.Module]) -> None:
    """Say that modules of this exact class are MLPs that treat each token alone."""
    _TOKENWISE_MLPS.add(qualified_name(cls))


@dataclass(frozen=True)
class LinearSite:
    """One linear layer, convolution or whole MLP, and what it is going to become."""

    name: str
    module: nn.Module
    spec: LinearSpec

    def change(self, detail: str) -> Change:
        """Return the line of the Conversion about it."""
        return Change(self.name, qualified_name(_source(self.module)), detail)


def plan_linears(
    model: nn.Module,
    recipe: Recipe,
    filter_fn: Callable[[nn.Module, str], bool] | None,
    attention: Mapping[str, nn.Module],
    conversion: Conversion,
) -> list[LinearSite]:
    """Return what to convert; note what is kept or refused. `attention`: the model's attention modules by name."""
    found = _found(model, attention)
    patterns = [pattern for pattern, spec in recipe.modules.items() if isinstance(spec, LinearSpec)]
    for pattern in patterns:
        if not any(recipe.names_module(pattern, name) for name in found):
            listed = ", ".join(list(found)[:5])
            raise InputError(f"modules[{pattern!r}] names no linear layer, MLP or convolution; there are {listed}, ...")
    roles = {"projections": recipe.projections, "mlp": recipe.mlp, "": LinearSpec()}
    units: dict[str, LinearSpec] = {}
    sites = []
    for name, (module, role) in found.items():
        # found lists a module before its children, so an MLP's spec is known when its layers come up.
        unit = next((u for u in units if name.startswith(f"{u}.")), None)
        spec = recipe.linear_spec_for(name, roles[role] if unit is None else units[unit])
        if _is_mlp(module):
            units[name] = spec
            if spec.primitive != "mixture":
                if not isinstance(module, MixtureMlp):
                    continue
                spec = LinearSpec()  # its layers get their own
        elif unit is not None and units[unit].primitive == "mixture" and spec == units[unit]:
            continue  # the MLP is the mixture
        site = LinearSite(name, module, spec)
        if spec.primitive == "multiply" and not isinstance(module, OURS):
            continue
        if filter_fn is not None and not filter_fn(module, name):
            conversion.kept.append(site.change("filter_fn left it out"))
        elif (reason := _objection(module, spec)) is not None:
            conversion.refused.append(site.change(reason))
        else:
            sites.append(site)
    return sites


def convert_linear(site: LinearSite) -> str:
    """Swap the module in place and return what a reader should know; raises InputError where its weights do not fit."""
    module, spec = site.module, site.spec
    if getattr(module, "linear_spec", None) == spec:
        return str(spec)
    for child in module.modules():
        restore_(child)
    detail = str(spec)
    if spec.primitive == "mixture":
        # Every router starts differently, and the same in each process.
        settings = {**spec.of_mixture(), "seed": zlib.crc32(site.name.encode())}
        if _is_mlp(module):
            mixture_mlp_(module, **settings)
        elif isinstance(module, nn.Linear):
            MixtureLinear.adopt_(module, **settings)
    elif spec.primitive == "shift":
        shift: ShiftConv2d | ShiftLinear
        if isinstance(module, nn.Conv2d):
            shift = ShiftConv2d.adopt_(module, bits=spec.bits, variant=spec.variant)
        else:
            shift = ShiftLinear.adopt_(module, bits=spec.bits, variant=spec.variant, activations=spec.activations)
        detail += f"; weight error {100 * shift.quantization_error():.1f} %"
    elif isinstance(module, nn.Linear) and spec.primitive == "integer":
        error = IntLinear.adopt_(module, bits=spec.bits).quantization_error()
        detail += f"; weight error {100 * error:.1f} %"
    if spec.primitive != "multiply":
        module.linear_spec = spec  # type: ignore[assignment]  # a plain attribute
    return detail


def restore_(module: nn.Module) -> None:
    """Make a converted module multiply again, by its latent weights; a plain one is left alone."""
    if isinstance(module, OURS):
        module.restore_()
        module.__dict__.pop("linear_spec", None)


def pack_(model: nn.Module, names: Collection[str] | None = None) -> int:
    """Replace the latent weights of the shift layers in `model` by packed codes, for deployment; return how many were.

    Results stay the same; shift layers cannot be trained or converted any more. With `names` only those modules.
    Raises InputError where a weight is not finite or its dtype cannot hold a power of two that is used.
    """
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, (ShiftLinear, ShiftConv2d)) and not module.packed and (names is None or name in names)
    ]
    for layer in layers:
        layer.pack_()
    return len(layers)


def linear_specs(model: nn.Module) -> dict[str, LinearSpec]:
    """Return what each converted linear layer, convolution or MLP of `model` is, by qualified name."""
    found = {name: getattr(module, "linear_spec", None) for name, module in model.named_modules()}
    return {name: spec for name, spec in found.items() if isinstance(spec, LinearSpec)}


def _found(model: nn.Module, attention: Mapping[str, nn.Module]) -> dict[str, tuple[nn.Module, str]]:
    """Return every linear layer, convolution and token-wise MLP by name, with its role: projections, mlp, or none."""
    found: dict[str, tuple[nn.Module, str]] = {}
    skipped: set[str] = set()
    for name, module in model.named_modules():
        if any(name.startswith(f"{s}.") for s in skipped):
            continue
        if isinstance(module, ValueConv):
            skipped.add(name)  # ours: it has no multiplications to spare
        if isinstance(module, Mixture):
            skipped |= {f"{name}.{child}" for child in module.added_children}
        if name in skipped or not (isinstance(module, (nn.Linear, nn.Conv2d)) or _is_mlp(module)):
            continue
        plain = not isinstance(module, nn.Conv2d) or _is_linear(module)
        role = _role(name, attention) if plain else ""
        found[name] = (module, role)
    return found


def _is_linear(conv: nn.Conv2d) -> bool:
    """Say whether a convolution is a linear layer over channels: 1 x 1, dense, at every place (levit_conv_*)."""
    return {*conv.kernel_size, *conv.stride, conv.groups} == {1}


def _role(name: str, attention: Mapping[str, nn.Module]) -> str:
    """Return "projections" inside an attention module, "mlp" beside exactly one (in its block), "" elsewhere."""
    if any(name.startswith(f"{a}.") for a in attention):
        return "projections"
    for ancestor in _parents(name):
        inside = sum(a.startswith(f"{ancestor}.") for a in attention)
        if inside:
            return "mlp" if inside == 1 else ""
    return ""


def _parents(name: str) -> Iterator[str]:
    """Yield the names of the modules around the one with that name, the nearest first, without the model itself."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _is_mlp(module: nn.Module) -> bool:
    return qualified_name(_source(module)) in _TOKENWISE_MLPS


def _source(module: nn.Module) -> type[nn.Module]:
    """Return the module's class before conversion."""
    if isinstance(module, Mixture):
        return module.source
    if isinstance(module, OURS):
        return nn.Conv2d if isinstance(module, nn.Conv2d) else nn.Linear
    return type(module)


def _objection(module: nn.Module, spec: LinearSpec) -> str | None:
    """Return why the module cannot become what `spec` says, or None."""
    if "forward" in module.__dict__:
        return OWN_FORWARD
    if _is_mlp(module):
        return None
    if type(module) not in (*_LINEAR, *_CONV):
        return f"{qualified_name(type(module))} is not a plain linear layer, so its output could not be kept"
    if isinstance(module, nn.Conv2d) and (objection := _conv_objection(spec)) is not None:
        return objection
    if getattr(module, "packed", False):
        return None if spec == getattr(module, "linear_spec", None) else "is packed: its latent weight is gone"
    own_weight = "weight" in module._parameters
    return None if own_weight else "its weight is not a parameter of its own (weight norm, pruning): remove that first"


def _conv_objection(spec: LinearSpec) -> str | None:
    """Return why a convolution cannot become what `spec` says, or None."""
    if spec.primitive not in ("shift", "multiply"):
        return f"there is no {spec.primitive} primitive for convolutions: use 'shift'"
    if spec.activations != "float":
        return f"a shift convolution takes float activations, not {spec.activations}"
    return None
