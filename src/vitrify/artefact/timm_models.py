"""How a timm model was built: by name and arguments, or inferred from the model and proved by building it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vitrify.artefact.compare import differences, warn_of_drop_rates
from vitrify.errors import InputError, VitrifyError, unknown

# What an artefact keeps of timm's pretrained_cfg: how to prepare an image and name a class, not where to download.
KEPT_CFG = (
    "architecture",
    "tag",
    "input_size",
    "fixed_input_size",
    "pool_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "num_classes",
    "label_names",
    "first_conv",
    "classifier",
    "license",
)


def build(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Build a registered timm model. InputError for unknown names (with the nearest) and arguments it does not take."""
    import timm  # noqa: PLC0415  # two seconds that a Hugging Face model need not wait

    # Importing it registers vitrify's own models with timm.
    import vitrify.models  # noqa: F401, PLC0415

    arguments = _with_tuples(arguments)
    prefixed = name.startswith(("hf-hub:", "local-dir:"))
    if not prefixed and not timm.is_model(name.split(".", maxsplit=1)[0]):
        raise unknown("model", name, timm.list_models())
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        if "img_size" in str(error) and "img_size" in arguments:
            # Convolutional families (PVT, MobileViT) take any size and so no such argument: only the record needs it.
            rest = {key: value for key, value in arguments.items() if key != "img_size"}
            return _record_size(build(name, rest, pretrained=pretrained), arguments["img_size"])
        raise InputError(f"cannot build {name!r} with {arguments}: {error}") from error
    except (ValueError, AssertionError, RuntimeError, OSError) as error:
        _refuse(name, arguments, pretrained, error)
    if arguments.get("img_size") is not None:
        _record_size(model, arguments["img_size"])
    return model


def _refuse(name: str, arguments: Mapping[str, Any], pretrained: bool, error: Exception) -> None:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if not pretrained:
        raise InputError(f"cannot build {name!r} with {dict(arguments)}: {reason}") from error
    if "No pretrained weights exist" in reason or "Invalid pretrained tag" in reason:
        raise InputError(f"{reason}. Leave out `pretrained`, or give a checkpoint file.") from error
    raise VitrifyError(
        f"the pre-trained weights of {name!r} could not be fetched or loaded: {reason.rstrip('.')}. "
        "Without a network, give a file with `checkpoint=` (`--checkpoint`)"
    ) from error


def _record_size(model: nn.Module, img_size: Any) -> nn.Module:
    height, width = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    cfg["input_size"] = (_in_chans(model) or cfg["input_size"][0], height, width)
    return model


def _in_chans(model: nn.Module) -> int | None:
    conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if conv is None else conv.in_channels


def _img_size(model: nn.Module) -> tuple[int, int] | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return None if size is None else (int(size[0]), int(size[1]))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images this timm model was built for."""
    channels, height, width = model.pretrained_cfg["input_size"]  # type: ignore[index]
    return (_in_chans(model) or channels, *(_img_size(model) or (height, width)))


def has_new_head(model: nn.Module) -> bool:
    """Say whether this model, built with published weights, has a classifier of another width: a random one."""
    classes: Any = getattr(model, "num_classes", 0)
    return bool(classes) and classes != model.pretrained_cfg["num_classes"]  # type: ignore[index]


def _depth(model: nn.Module) -> int | None:
    blocks = getattr(model, "blocks", None)
    return len(blocks) if isinstance(blocks, nn.Sequential) else None


def _num_heads(model: nn.Module) -> int | None:
    blocks = getattr(model, "blocks", None)
    first = blocks[0] if isinstance(blocks, nn.Sequential) and len(blocks) else None
    return getattr(getattr(first, "attn", None), "num_heads", None)


def _plain(attribute: str) -> Callable[[nn.Module], Any]:
    def read(model: nn.Module) -> Any:
        value = getattr(model, attribute, None)
        return value if isinstance(value, (bool, int, str)) else None

    return read


# Arguments of timm models that can be read back from the built model.
_READERS: dict[str, Callable[[nn.Module], Any]] = {
    "num_classes": _plain("num_classes"),
    "global_pool": _plain("global_pool"),
    "dynamic_img_size": _plain("dynamic_img_size"),
    "embed_dim": _plain("embed_dim"),
    "depth": _depth,
    "num_heads": _num_heads,
    "in_chans": _in_chans,
    "img_size": _img_size,
}


def describe(model: nn.Module, converted: set[str]) -> dict[str, Any]:
    """Return the builder record of a timm model: {"library", "name", "arguments", "pretrained_cfg", ...}.

    The record is proved: the model is built again without storage, and its modules, names and shapes are compared
    outside the `converted` modules. InputError says what differs.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    record: dict[str, Any] = dict(getattr(model, "_vitrify_builder", None) or {})
    name = cfg.get("architecture")
    if not name:
        raise InputError(f"{type(model).__name__} was not built by a registered timm name")
    arguments = dict(record.get("arguments", {}))
    reference = _on_meta(name, arguments)
    differing = {
        key: read(model) for key, read in _READERS.items() if read(model) is not None and read(model) != read(reference)
    }
    if differing:
        arguments |= differing
        reference = _on_meta(name, arguments)
    if problem := next(differences(model, reference, converted), None):
        raise InputError(f"building {name!r} with {arguments} gives another model: {problem}")
    warn_of_drop_rates(model, reference)
    kept = {key: cfg[key] for key in KEPT_CFG if cfg.get(key) is not None}
    kept["input_size"] = input_size(model)
    return {**record, "library": "timm", "name": name, "arguments": arguments, "pretrained_cfg": kept}


def _on_meta(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return build(name, arguments)


def rebuild(record: Mapping[str, Any]) -> nn.Module:
    """Build the model of a record again, with its saved pretrained_cfg and with fresh weights."""
    model = build(record["name"], record.get("arguments", {}))
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    cfg.update(_with_tuples(record.get("pretrained_cfg", {})))
    return model


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what JSON does to tuples: timm's arguments and settings are never lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
