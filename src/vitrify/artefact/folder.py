"""The artefact folder: `model.safetensors`, `recipe.json` and `config.json`, written whole or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import vitrify
from vitrify.artefact.atomic import replacing
from vitrify.artefact.builders import describe, rebuild, record_as_loaded, record_to_save
from vitrify.artefact.checkpoints import mismatch, read_safetensors
from vitrify.convert import Change, Conversion, Recipe, convert_
from vitrify.convert.adapters.base import Adapter
from vitrify.convert.linears import linear_specs, pack_
from vitrify.convert.specs import Spec
from vitrify.errors import InputError
from vitrify.nn.mixture import Mixture

FORMAT = "vitrify-artefact"
FORMAT_VERSION = 1
WEIGHTS, RECIPE, CONFIG = "model.safetensors", "recipe.json", "config.json"
_REASONS = ("changed", "kept", "refused", "notes")


def save(model: nn.Module, path: str | Path) -> Path:
    """Write `model`, its recipe and how it was built to the folder `path`, and return the folder.

    All persistent parameters and buffers are written, in their own dtypes. The folder appears whole or not at all: it
    is written beside its final place and renamed; an artefact already there is replaced, any other folder is refused
    unless empty. A model that vitrify cannot build again (see `create_model`) is written with a warning: `load` then
    needs `model=`. Drop-out rates are those the model is built with by `create_model`'s arguments or its configuration:
    where the model's own differ, that is a warning too, and what `load` returns would train differently.

    Raises InputError where `path` holds something else, or where `convert_` was called on a part of the model, so that
    the model's own record does not say what it is; VitrifyError where it cannot be written (disk full, read-only), in
    which case nothing is left behind.
    """
    model = _unwrapped(model)
    conversion = getattr(model, "_vitrify", None)
    converted: dict[str, Spec] = dict(linear_specs(model))
    converted |= {n: module.attention_spec for n, module in model.named_modules() if isinstance(module, Adapter)}
    _check_recorded(converted, {} if conversion is None else conversion.applied)
    builder = _builder(model, set(converted))
    if builder["library"] == "caller":
        warnings.warn(
            f"{path}: only `vitrify.load(path, model=...)` will read this artefact, since {builder['reason']}",
            stacklevel=2,
        )
    tensors, aliases = _tensors(model)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "vitrify_version": vitrify.__version__,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "builder": builder,
        "conversion": conversion and _conversion_record(conversion),
        # What the experts of a mixture take on the target, which its training and the cost model read.
        "calibration": {"alpha": {name: list(mixture.alpha) for name, mixture in _mixtures(model).items()}},
        "aliases": aliases,
    }
    recipe = conversion.recipe.to_dict() if conversion else None
    check_target(path)
    with replacing(Path(path)) as folder:
        _write_json(folder / CONFIG, config)
        _write_json(folder / RECIPE, recipe)
        _write_tensors(folder / WEIGHTS, tensors)
        # safetensors makes its file private to its owner, unlike the others.
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    return Path(path)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read an artefact folder back and return the model in eval mode, on the CPU.

    Without `model`, the recorded builder makes the model (timm or transformers must be installed). With it, the given
    model, unconverted or converted by the same recipe, is converted in place and gets the weights.

    Raises InputError for missing or truncated files, weights that do not fit (naming missing and unexpected keys), a
    newer format, and a `model` that the recipe does not turn into the saved one.
    """
    path = Path(path)
    config = _read_config(path)
    raw_recipe = _read_json(path / RECIPE)
    model = rebuild(config["builder"]) if model is None else _unwrapped(model)
    recipe = None if raw_recipe is None else Recipe.from_dict(raw_recipe)
    _convert_as_saved(model, recipe, config["conversion"], path)
    tensors = read_safetensors(path / WEIGHTS)
    tensors |= {alias: tensors[kept] for alias, kept in config["aliases"].items() if kept in tensors}
    pack_(model, {key.removesuffix(".codes") for key in tensors})
    if problem := mismatch(model.state_dict(), tensors):
        raise InputError(f"{path / WEIGHTS} does not fit {type(model).__name__} with this recipe: {problem}")
    _adopt_dtypes(model, tensors)
    model.load_state_dict(tensors, strict=True)
    mixtures = _mixtures(model)
    for name, alpha in config.get("calibration", {}).get("alpha", {}).items():
        mixtures[name].set_alpha(alpha)
    record = record_as_loaded(config["builder"], model, path)
    if record["library"] != "caller" or not hasattr(model, "_vitrify_builder"):
        model._vitrify_builder = record  # type: ignore[assignment]
    return model.eval()


def is_artefact(path: str | Path) -> bool:
    """Say whether `path` is a folder that `save` wrote."""
    try:
        return bool(json.loads((Path(path) / CONFIG).read_text()).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return False


def check_target(path: str | Path) -> None:
    """Refuse a folder that `save` would not replace, before hours of work are spent: same errors as `save`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: an artefact is a folder, give the name of a new one")
    if not path.exists():
        return
    names = {entry.name for entry in path.iterdir()}
    if names and not is_artefact(path):
        raise InputError(f"{path} exists and is not an artefact: give a new folder, or empty this one")
    if foreign := sorted(names - {WEIGHTS, RECIPE, CONFIG}):
        raise InputError(
            f"{path} is an artefact, but also holds {', '.join(foreign[:5])}: move these before replacing it"
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _mixtures(model: nn.Module) -> dict[str, Mixture]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}


def _check_recorded(converted: dict[str, Spec], recorded: dict[str, Spec]) -> None:
    names = converted.keys() | recorded.keys()
    if differing := sorted(name for name in names if converted.get(name) != recorded.get(name)):
        listed = ", ".join(name or "(the model)" for name in differing[:5])
        raise InputError(
            f"the model's record of its conversion is wrong about {len(differing)} of its modules ({listed}), so it "
            "could not be loaded again: convert the whole model, with convert_(model, recipe, filter_fn), not a part"
        )


def _conversion_record(conversion: Conversion) -> dict[str, Any]:
    content = conversion.to_dict()
    kept = ("input_size", *_REASONS)
    return {"resolved": conversion.resolved.to_dict(), **{name: content[name] for name in kept}}


def _builder(model: nn.Module, converted: set[str]) -> dict[str, Any]:
    try:
        record = record_to_save(describe(model, converted), model)
        json.dumps(record)
    except (InputError, TypeError) as error:
        # Losing a trained model because it cannot be built by name would be worse than needing `model=` later.
        return {"library": "caller", "class": type(model).__qualname__, "reason": str(error)}
    return record


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state dict with each shared tensor once, and {left-out name: kept name}."""
    seen: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name!r} in the state dict is a {type(tensor).__name__}: only tensors can be saved")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    # safetensors refuses tensors that overlap without being equal (views of one buffer): these get their own storage.
    return {
        name: tensor.clone() if storages.count(tensor.untyped_storage().data_ptr()) > 1 else tensor
        for name, tensor in tensors.items()
    }, aliases


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        # Its errors are the system's in text form; as OSError they take the same way as all others.
        raise OSError(str(error)) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file} is missing: an artefact has {CONFIG}, {RECIPE} and {WEIGHTS}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"no artefact at {path}: expected a folder with {CONFIG}, {RECIPE} and {WEIGHTS}")
    config = _read_json(path / CONFIG)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise InputError(f"{path / CONFIG} is not of a vitrify artefact (its format is not {FORMAT!r})")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{path} has artefact format {version}, written by vitrify {config.get('vitrify_version')}; "
            f"this is vitrify {vitrify.__version__}, which reads format {FORMAT_VERSION}: upgrade vitrify"
        )
    missing = {"builder", "conversion", "aliases"} - config.keys()
    if missing:
        raise InputError(f"{path / CONFIG} lacks {', '.join(sorted(missing))}")
    return config


def _convert_as_saved(model: nn.Module, recipe: Recipe | None, converted: Any, path: Path) -> None:
    """Convert exactly the modules that were converted when the artefact was saved, to what they were."""
    earlier = getattr(model, "_vitrify", None)
    if earlier is not None and (recipe is None or earlier.recipe != recipe):
        wanted = "without a recipe" if recipe is None else f"with recipe {recipe.name!r}, differently set"
        raise InputError(f"the given model was converted by {earlier.recipe.name!r}, but {path} was saved {wanted}")
    if recipe is None:
        return
    # The outcome of the filter and of the cost rule is on record; neither is asked again.
    resolved = Recipe.from_dict(converted["resolved"])
    try:
        conversion = convert_(model, resolved, lambda _, name: name in resolved.modules)
    except InputError as error:
        raise InputError(f"the recipe of {path} does not fit {type(model).__name__}: {error}") from error
    if failed := sorted(set(resolved.modules) - set(conversion.applied)):
        refused = {change.name: change.detail for change in conversion.refused}
        reasons = [f"{name} ({refused.get(name, 'this model has no such attention')})" for name in failed[:5]]
        raise InputError(
            f"the recipe of {path} does not convert {type(model).__name__} as it did when saved: {', '.join(reasons)}"
        )
    size = converted["input_size"]
    conversion.recipe, conversion.input_size = recipe, None if size is None else tuple(size)
    # What this conversion says of filters and costs is about the resolved recipe; the saved one knew the reasons.
    for group in ("changed", "kept", "refused"):
        setattr(conversion, group, [Change(**change) for change in converted.get(group, [])])
    conversion.notes = list(converted.get("notes", []))


def _adopt_dtypes(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give every parameter and buffer the dtype it was saved with, so that loading does not round."""
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(floating) == 1 and floating != {torch.float32}:
        # Through `to`, so that buffers which are not saved follow, as they did in the saved model.
        model.to(floating.pop())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype != tensors[name].dtype:
            tensor.data = tensor.data.to(tensors[name].dtype)
