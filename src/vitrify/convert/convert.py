"""`convert_`: swaps a model's attention and linear layers in place, and says what it did to every one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vitrify.convert.adapters import (
    adapter_for,
    looks_like_attention,
    no_adapter_reason,
    qualified_name,
    without_products,
)
from vitrify.convert.adapters.base import Adapter, adopt, make_core, objection, release_grids
from vitrify.convert.conversion import Change, Conversion
from vitrify.convert.linears import LinearSite, convert_linear, linear_specs, plan_linears
from vitrify.convert.recipe import Recipe
from vitrify.convert.specs import AttentionSpec, Spec
from vitrify.convert.tokens import InputSize, Shape, Trial, check_input_size, default_input_size, trial_run
from vitrify.errors import InputError, VitrifyError, unknown
from vitrify.nn import TokenGrid, ValueConv

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class _Site:
    """One attention module that is going to be converted."""

    name: str
    module: nn.Module
    adapter: type[Adapter]
    spec: AttentionSpec

    def change(self, detail: str) -> Change:
        return Change(self.name, qualified_name(self.adapter.source), detail)


def convert_(
    model: nn.Module,
    recipe: Recipe,
    filter_fn: FilterFn | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
) -> Conversion:
    """Convert `model` in place as `recipe` says; return what was changed, kept and refused.

    filter_fn   (module, qualified name) -> bool: attention modules, linear layers, MLPs and convolutions that the
                recipe would change and for which it is False are kept
    input_size  (channels, height, width) at which costs are compared; by default what the model was built for

    Objects, Parameters, child names, hooks, `requires_grad` and mode survive; state-dict keys change only where the
    recipe adds parameters (value_conv, codes, mixtures). What cannot be converted exactly is refused, and stays as it
    was. Converting again replaces what differs: what a recipe leaves as it is keeps its learned parameters. The
    Conversion is also left on the model as `model._vitrify`.

    Raises InputError, with the model unchanged, if a pattern in `modules` names nothing, if the model does not take
    `input_size`, or if it is the wrapper of torch.compile or (Distributed)DataParallel around a model.

    >>> import timm, torch
    >>> model = timm.create_model("deit_tiny_patch16_224")
    >>> print(str(convert_(model, Recipe("mine", "taylor"))).splitlines()[0])
    recipe 'mine': 12 changed, 0 kept, 0 refused
    """
    if not isinstance(recipe, Recipe):
        raise InputError(f"recipe must be a Recipe, such as vitrify.recipes.vitality(), not {recipe!r}")
    _check_not_wrapped(model)
    size = None if input_size is None else check_input_size(input_size)
    conversion = Conversion(recipe)
    found = _attention_modules(model)
    sites = _plan(found, recipe, filter_fn, conversion)
    linears = plan_linears(model, recipe, filter_fn, found, conversion)
    trial = _trial(model, recipe, sites, linears, size, conversion)
    for site in sites:
        _apply(model, site, trial.shapes.get(site.name), conversion)
    for linear in linears:
        _apply_linear(linear, trial, conversion)
    release_grids(model)
    touched = {site.name for site in sites} | {site.name for site in linears}
    conversion.applied = _left_standing(model, touched, conversion) | conversion.applied
    model._vitrify = conversion  # type: ignore[assignment]  # a plain attribute, which nn.Module's types do not foresee
    return conversion


def _check_not_wrapped(model: nn.Module) -> None:
    """Refuse wrappers: the Conversion belongs on the model inside, which is what is saved and what has the names."""
    parallel = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    inner = "module" if parallel else "_orig_mod"
    if parallel or isinstance(getattr(model, inner, None), nn.Module):
        raise InputError(
            f"{type(model).__name__} wraps the model: convert first, and compile or parallelise after that "
            f"(or convert its `.{inner}` and wrap that again)"
        )


def _plan(
    found: dict[str, nn.Module], recipe: Recipe, filter_fn: FilterFn | None, conversion: Conversion
) -> list[_Site]:
    """Return which attention modules to convert; note what is kept or refused."""
    for pattern, spec in recipe.modules.items():
        if isinstance(spec, AttentionSpec) and not any(recipe.names_module(pattern, name) for name in found):
            raise unknown("attention module in recipe.modules", pattern, found)
    sites = []
    for name, module in found.items():
        adapter = adapter_for(module)
        source = qualified_name(type(module) if adapter is None else adapter.source)
        if filter_fn is not None and not filter_fn(module, name):
            conversion.kept.append(Change(name, source, "filter_fn left it out"))
            continue
        if (nothing := without_products(module)) is not None:
            conversion.kept.append(Change(name, source, nothing))
            continue
        spec = recipe.spec_for(name)
        reason = no_adapter_reason(module) if adapter is None else objection(module, adapter, spec)
        if adapter is None or reason is not None:
            conversion.refused.append(Change(name, source, str(reason)))
        else:
            sites.append(_Site(name, module, adapter, spec))
    return sites


def _attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the innermost modules that look like attention, by qualified name, without blocks that merely hold one."""
    found = {n: m for n, m in model.named_modules() if adapter_for(m) is not None or looks_like_attention(m)}
    return {
        name: module
        for name, module in found.items()
        if adapter_for(module) is not None
        or not any(inner is not module and inner in found.values() for inner in module.modules())
    }


def _trial(
    model: nn.Module,
    recipe: Recipe,
    sites: list[_Site],
    linears: list[LinearSite],
    size: InputSize | None,
    conversion: Conversion,
) -> Trial:
    """Return what a shape-only forward at `size`, or at the model's own, tells; if neither runs, note what it hides."""
    unasked = not recipe.keep_if_costlier and not recipe.min_tokens
    if not linears and (unasked or all(site.spec.core == "softmax" for site in sites)):
        return Trial()
    chosen = size or default_input_size(model)
    problem = "the model does not say its image size"
    if chosen is not None or hasattr(model, "example_batch"):
        try:
            trial = trial_run(model, {site.name: site.adapter for site in sites}, [s.name for s in linears], chosen)
        except Exception as error:  # any model may be given, and may fail in any way
            problem = f"a trial run at {chosen or 'its example batch'} failed: {type(error).__name__}: {error}"
            if size is not None:
                raise InputError(f"input_size {size} does not suit the model: {problem}") from error
        else:
            conversion.input_size = chosen
            return trial
    conversion.notes.append(f"token count unknown, cost not checked: {problem}")
    return Trial()


def _apply(model: nn.Module, site: _Site, shape: Shape | None, conversion: Conversion) -> None:
    core = make_core(site.spec, site.adapter, site.module)
    remark = site.adapter.remark(site.module, site.spec)
    detail = f"{site.spec}; {remark}" if remark else str(site.spec)
    if shape is not None:
        keys = shape.num_queries if site.spec.reduction == "remove" else shape.num_keys
        sizes = (shape.num_queries, keys, shape.key_dim, shape.value_dim)
        before = site.adapter.softmax_core(site.module).multiplications(
            shape.num_queries, shape.num_keys, shape.key_dim, shape.value_dim
        )
        after = core.multiplications(*sizes, biased=shape.has_bias)
        after += ValueConv.multiplications(site.adapter.conv_kernel(site.spec.value_conv), keys, shape.value_dim)
        tokens = f"{shape.num_queries} queries, {keys} keys"
        kept = ""
        if site.spec.core != "softmax" and keys < conversion.recipe.min_tokens:
            kept = f"{tokens}: fewer than min_tokens, {conversion.recipe.min_tokens}"
        elif conversion.recipe.keep_if_costlier and after > before and site.spec.core in ("taylor", "taylor_sparse"):
            kept = f"{tokens}: {site.spec.core} would multiply {after:,} times per head, softmax {before:,}"
        if kept:
            conversion.kept.append(site.change(kept))
            if isinstance(site.module, Adapter):
                adopt(site.module, site.adapter, site.adapter.softmax_core(site.module))
                _record(site, AttentionSpec(), conversion)
            return
        detail += f"; {tokens}: {before:,} -> {after:,} multiplications per head"
    grid: TokenGrid | str | None = None
    if site.spec.value_conv:
        grid = site.adapter.find_grid(site.module, _ancestors(model, site.name))
    if isinstance(grid, str):
        conversion.refused.append(site.change(grid))
        return
    if getattr(site.module, "attention_spec", None) == site.spec and isinstance(site.module, Adapter):
        core = site.module.core  # with whatever it has learned
    adopt(site.module, site.adapter, core, site.spec.value_conv, grid)
    conversion.changed.append(site.change(detail))
    _record(site, site.spec, conversion)


def _apply_linear(site: LinearSite, trial: Trial, conversion: Conversion) -> None:
    if trial.called is not None and site.name not in trial.called:
        conversion.refused.append(
            site.change("is never called: the module around it reads its weight, or leaves it out")
        )
        return
    try:
        detail = convert_linear(site)
    except VitrifyError as error:
        conversion.refused.append(site.change(str(error)))
        return
    conversion.changed.append(site.change(detail))
    if site.spec.primitive != "multiply":
        conversion.applied[site.name] = site.spec


def _record(site: _Site, spec: AttentionSpec, conversion: Conversion) -> None:
    """Note what the module now is, for the model's record and on the module, where a later call on a part shows."""
    conversion.applied[site.name] = spec
    site.module.attention_spec = spec  # type: ignore[assignment]  # a plain attribute


def _left_standing(model: nn.Module, touched: set[str], conversion: Conversion) -> dict[str, Spec]:
    """Return what an earlier conversion made of the modules that this one did not touch."""
    earlier = getattr(model, "_vitrify", None)
    if not isinstance(earlier, Conversion):
        return {}
    gone = touched - {change.name for change in conversion.refused}
    standing = linear_specs(model)  # an MLP that became one mixture took its layers' specs with it
    return {
        name: spec
        for name, spec in earlier.applied.items()
        if name not in gone and (isinstance(spec, AttentionSpec) or name in standing)
    }


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules around the one with that name, the model first."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))] if name else []
