"""Models by name, with a record of how each was built that is enough to build it again in another process."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vitrify.artefact import hf_models, timm_models
from vitrify.artefact.checkpoints import load_weights, read_checkpoint
from vitrify.artefact.hf_models import is_transformers
from vitrify.convert.specs import AttentionSpec, Spec
from vitrify.errors import InputError, unknown

_HF_PREFIX = "hf:"

# Parts of vitrify with models of their own, and the module of each that has `describe` and `rebuild` for them; it is
# imported when such a model, or its record, is met.
_PARTS = {"vitrify.nvs": "vitrify.nvs.presets"}


def create_model(
    name: str, *, pretrained: bool = False, checkpoint: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """Build a timm or Hugging Face model that `vitrify.save` can write and `vitrify.load` can build again.

    - `name`: a timm name ("deit_tiny_patch16_224", "vit_base_patch16_224.augreg_in21k", or vitrify's own
      "vit_mini_patch2_28"), or "hf:" and a folder with a Hugging Face `config.json` ("hf:./dinov2-small").
    - `pretrained`: load the published weights (for "hf:", the folder's own).
    - `checkpoint`: load a `.safetensors` or `.pth` file instead; see `read_checkpoint`.
    - `kwargs`: timm's arguments (`img_size`, `num_classes`, `in_chans`, ...), or fields of the Hugging Face config.
      None means the model's own default.

    Raises InputError for an unknown name (with the nearest ones), arguments that the model does not take, and
    checkpoints that do not fit; VitrifyError where pre-trained weights cannot be fetched.

    >>> model = create_model("vit_mini_patch2_28", pretrained=True)
    """
    if pretrained and checkpoint is not None:
        raise InputError("give either pretrained=True or a checkpoint, not both: which weights should be loaded?")
    arguments = {key: value for key, value in kwargs.items() if value is not None}
    if name.startswith(_HF_PREFIX):
        model = hf_models.build(name.removeprefix(_HF_PREFIX), arguments, pretrained=pretrained)
    else:
        model = timm_models.build(name, arguments, pretrained=pretrained)
    new_head = pretrained and (hf_models if is_transformers(model) else timm_models).has_new_head(model)
    if checkpoint is not None:
        checkpoint = Path(checkpoint).resolve()
        new_head = load_weights(model, read_checkpoint(checkpoint), checkpoint)
    # With it `save` knows the arguments, and `vitrify eval --against original` finds the unconverted weights again.
    origin = {"name": name, "arguments": arguments, "pretrained": pretrained, "new_head": new_head}
    model._vitrify_builder = {  # type: ignore[assignment]
        "arguments": arguments,
        "origin": {**origin, "checkpoint": None if checkpoint is None else str(checkpoint)},
    }
    return model


def describe(model: nn.Module, converted: set[str]) -> dict[str, Any]:
    """Return the record from which `rebuild` builds this model; InputError where there is no such record.

    `converted` names the modules that `convert_` changed: they are compared no further.
    """
    part = next((part for part in _PARTS if type(model).__module__.startswith(f"{part}.")), None)
    if part is not None:
        return {**importlib.import_module(_PARTS[part]).describe(model, converted), "library": part}
    return hf_models.describe(model, converted) if is_transformers(model) else timm_models.describe(model, converted)


def rebuild(record: Mapping[str, Any]) -> nn.Module:
    """Build the unconverted model of a record, with fresh weights."""
    library = record.get("library")
    if library == "timm":
        return timm_models.rebuild(record)
    if library == "transformers":
        return hf_models.rebuild(record)
    if library in _PARTS:
        rebuilt: nn.Module = importlib.import_module(_PARTS[library]).rebuild(record)
        return rebuilt
    if library == "caller":
        raise InputError(
            f"this artefact holds a {record.get('class')} that vitrify cannot build ({record.get('reason')}): "
            "build the same model yourself and pass it, `vitrify.load(path, model=model)`"
        )
    raise unknown("model library", str(library), ["timm", "transformers", "caller", *_PARTS])


def rebuild_original(record: Mapping[str, Any]) -> nn.Module:
    """Build the unconverted model of a record with the weights it had before any fine-tuning.

    Raises InputError where the record does not say where those weights came from, or they cannot be had again.
    """
    origin = record.get("origin") or {}
    instead = "give the original itself, an artefact folder or a checkpoint file (--teacher or --against PATH)"
    if record.get("trained"):
        raise InputError(
            f"this model was trained unconverted, so its original is not the one it was built as: {instead}"
        )
    if path := origin.get("artefact"):
        # `folder` is built on this module.
        from vitrify.artefact.folder import load  # noqa: PLC0415

        return load(path)
    if origin.get("new_head"):
        classes = origin["arguments"].get("num_classes")
        raise InputError(
            f"the original had a new, random classifier{f' of {classes} classes' if classes else ''}, which is on "
            f"record nowhere: {instead}"
        )
    if not origin.get("pretrained") and not origin.get("checkpoint"):
        raise InputError(
            "it is not known where the original weights came from (neither `pretrained` nor a checkpoint was given "
            f"when the model was built): {instead}"
        )
    settings = {key: origin[key] for key in ("pretrained", "checkpoint")}
    return create_model(origin["name"], **settings, **origin["arguments"]).eval()


def is_plain(model: nn.Module) -> bool:
    """Say whether a model computes what it did before any conversion: softmax attention, layers that multiply."""
    conversion = getattr(model, "_vitrify", None)
    applied = {} if conversion is None else conversion.applied
    return all(_is_plain(spec) for spec in applied.values())


def _is_plain(spec: Spec) -> bool:
    if not isinstance(spec, AttentionSpec):
        return spec.primitive == "multiply"
    return spec.core == "softmax" and not spec.value_conv and spec.reduction == "keep"


def mark_trained(model: nn.Module) -> None:
    """Note that a model was trained: if it is plain, the weights it was built with are nobody's original any more."""
    if is_plain(model):
        model._vitrify_builder = {**(getattr(model, "_vitrify_builder", None) or {}), "trained": True}  # type: ignore[assignment]


def record_as_loaded(record: Mapping[str, Any], model: nn.Module, path: Path) -> dict[str, Any]:
    """Return the record of `model`, read from the artefact at `path`: trained and plain, that is where it begins."""
    if record.get("trained") and is_plain(model):
        return {**record, "origin": {"artefact": str(path.resolve())}}
    return dict(record)


def record_to_save(record: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return the record of `model`: converted after it was read as trained, it has an original again, on disk."""
    if "artefact" in (record.get("origin") or {}) and not is_plain(model):
        return {key: value for key, value in record.items() if key != "trained"}
    return dict(record)


def input_config(model: nn.Module) -> dict[str, Any]:
    """Return how to prepare images: input_size (channels, height, width), mean, std, interpolation and crop_pct.

    Mean and standard deviation have one value per channel: published RGB values are averaged for a grey model.
    """
    cfg = hf_models.pretrained_cfg(model) if is_transformers(model) else getattr(model, "pretrained_cfg", None)
    if not cfg:
        raise InputError(f"{type(model).__name__} does not say which images it expects: it has no pretrained_cfg")
    size = tuple(timm_models.input_size(model)) if not is_transformers(model) else tuple(cfg["input_size"])
    return {
        "input_size": size,
        "mean": _per_channel(cfg["mean"], size[0]),
        "std": _per_channel(cfg["std"], size[0]),
        "interpolation": cfg.get("interpolation") or "bicubic",
        "crop_pct": cfg.get("crop_pct") or 1.0,
    }


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
