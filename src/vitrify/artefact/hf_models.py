"""How a Hugging Face model was built: its class, its configuration and the few constructor arguments beside it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrify.artefact.compare import differences, warn_of_drop_rates
from vitrify.errors import InputError, optional, unknown

# vitrify speaks timm everywhere; these are the same things in a Hugging Face config.
_TIMM_NAMES = {"img_size": "image_size", "in_chans": "num_channels", "num_classes": "num_labels"}
# transformers' own defaults, used where a folder has no preprocessor_config.json.
_HALF = (0.5, 0.5, 0.5)


def _transformers() -> Any:
    with optional("transformers", "hf", "a Hugging Face model"):
        import transformers  # noqa: PLC0415  # an extra
    return transformers


def is_transformers(model: nn.Module) -> bool:
    """Say whether a model is one of transformers' (without importing transformers to find out)."""
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__)


def parts(model: nn.Module) -> tuple[str, list[str]]:
    """Return the name of the encoder, itself a model of transformers, in a model with a head, and the head's names."""
    names = [name for name, child in model.named_children() if is_transformers(child)]
    if len(names) != 1 or not is_transformers(model):
        return "", []
    return names[0], [name for name, _ in model.named_children() if name not in names]


def has_new_head(model: nn.Module) -> bool:
    """Say whether this model, built with published weights, has random ones where these lacked some: a new head."""
    return bool(getattr(model, "_vitrify_new_head", False))


def _model_class(name: str) -> Any:
    """Return the class of that name from transformers itself, and nothing else: artefacts must not name other code."""
    transformers = _transformers()
    found = getattr(transformers, name, None)
    if not (inspect.isclass(found) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(f"{name!r} is not a model class of transformers {transformers.__version__}")
    return found


def build(source: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build the model that the `config.json` of a folder (or Hub name) describes; `arguments` override its fields.

    timm's `img_size`, `in_chans` and `num_classes` are understood. The class is the first of `architectures`. Code that
    comes with a checkpoint is never run.
    """
    transformers = _transformers()
    fields = {_TIMM_NAMES.get(key, key): value for key, value in arguments.items()}
    try:
        config, unused = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, return_unused_kwargs=True, **fields
        )
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no Hugging Face model at {source!r}: expected a folder with config.json ({reason})"
        ) from error
    if unused:
        raise unknown(f"field of {type(config).__name__}", next(iter(unused)), config.to_dict())
    if not config.architectures:
        raise InputError(f"the config.json of {source!r} names no class in `architectures`, for example ViTModel")
    model_class = _model_class(config.architectures[0])
    try:
        if pretrained:
            model, report = model_class.from_pretrained(
                source, config=config, trust_remote_code=False, output_loading_info=True
            )
            model._vitrify_new_head = bool(report["missing_keys"])
        else:
            model = model_class._from_config(config)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot build {model_class.__name__} from {source!r}: {reason}") from error
    model._vitrify_preprocessing = _preprocessing(source)
    return model  # type: ignore[no-any-return]


def _preprocessing(source: str) -> dict[str, Any]:
    file = Path(source) / "preprocessor_config.json"
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    return {key: content[f"image_{key}"] for key in ("mean", "std") if f"image_{key}" in content}


def describe(model: nn.Module, converted: set[str]) -> dict[str, Any]:
    """Return the builder record of a Hugging Face model, whoever built it.

    It is proved by building the model again without storage; InputError says what differs outside of `converted`.
    """
    config: Any = model.config
    arguments = {}
    takes_pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    if takes_pooler and getattr(model, "pooler", None) is None:
        arguments["add_pooling_layer"] = False
    record = {
        **(getattr(model, "_vitrify_builder", None) or {}),
        "library": "transformers",
        "class": type(model).__name__,
        "arguments": arguments,
        "config": json.loads(config.to_json_string(use_diff=False)),
        # The configuration leaves it out of its JSON, and SDPA and eager attention differ in their last bits.
        "attn_implementation": config._attn_implementation,
        "pretrained_cfg": pretrained_cfg(model),
    }
    with torch.device("meta"):
        reference = rebuild(record)
    if problem := next(differences(model, reference, converted), None):
        raise InputError(f"building {type(model).__name__} from its config gives another model: {problem}")
    warn_of_drop_rates(model, reference)
    return record


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return input size, mean and standard deviation in the form of timm's pretrained_cfg."""
    config: Any = model.config
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    known = getattr(model, "_vitrify_preprocessing", None) or {}
    return {
        "input_size": (getattr(config, "num_channels", 3), height, width),
        "mean": tuple(known.get("mean", _HALF)),
        "std": tuple(known.get("std", _HALF)),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    }


def rebuild(record: Mapping[str, Any]) -> nn.Module:
    """Build the model of a record again, with fresh weights."""
    model_class = _model_class(record["class"])
    config = model_class.config_class.from_dict(dict(record["config"]))
    model = model_class._from_config(
        config, attn_implementation=record.get("attn_implementation"), **record.get("arguments", {})
    )
    cfg = record.get("pretrained_cfg", {})
    model._vitrify_preprocessing = {key: cfg[key] for key in ("mean", "std") if key in cfg}
    return model  # type: ignore[no-any-return]
