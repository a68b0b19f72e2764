"""Weights from elsewhere: safetensors and `.pth` files, read without ever running pickle code."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vitrify.artefact.hf_models import is_transformers, parts
from vitrify.errors import InputError

# Where training scripts put the weights, best first: the averaged weights are the ones that were evaluated.
_STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# DistributedDataParallel and torch.compile wrap the model, in either order.
_WRAPPERS = ("module.", "_orig_mod.")
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return the weights in a `.safetensors` or torch (`.pth`, `.pt`, `.bin`, `.ckpt`, `.tar`) file, on the CPU.

    In a training checkpoint, `state_dict_ema` is preferred, then `model_ema`, `state_dict` and `model`. The prefixes
    that DistributedDataParallel and torch.compile put before every name are removed.

    Raises InputError where the file is missing, truncated, of another kind, or needs code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: expected a .safetensors or .pth file")
    if path.suffix == ".safetensors":
        return _unwrapped(read_safetensors(path))
    if path.suffix not in _TORCH_SUFFIXES:
        raise InputError(f"cannot tell what {path} is: expected .safetensors or one of {', '.join(_TORCH_SUFFIXES)}")
    return _unwrapped(_pick_state(read_torch(path), path))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file, on the CPU; InputError where it is missing or truncated."""
    try:
        return dict(load_file(path))
    except FileNotFoundError:
        raise InputError(f"no weights at {path}") from None
    except SafetensorError as error:
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size:,} bytes) is not a complete safetensors file: truncated, or of another kind ({error})"
        ) from error


def read_torch(path: Path) -> Any:
    """Return what a torch file holds, tensors on the CPU; InputError where it is damaged or needs code to be read."""
    try:
        # timm's training script stores its command line as a Namespace: plain attributes, no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file can break the reader anywhere.
        # torch's way of naming a function or class that the pickle would have called.
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"{path} was refused: reading it would run code stored in it ({found[1]}). "
                "vitrify reads tensors only; save the state dict alone, best as .safetensors"
            ) from error
        size = path.stat().st_size
        raise InputError(
            f"{path} ({size:,} bytes) is not a complete torch checkpoint: truncated, damaged or of another kind"
        ) from error


def _pick_state(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in _STATE_KEYS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = f"the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else type(content)
        raise InputError(f"{path} holds no state dict: found {found}; expected tensors, or {', '.join(_STATE_KEYS)}")
    return dict(content)


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((w for w in _WRAPPERS if tensors and all(k.startswith(w) for k in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def mismatch(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str | None:
    """Say how the names and shapes of `given` differ from `expected`; None where they agree.

    >>> mismatch({"a": torch.zeros(2)}, {"b": torch.zeros(2)})
    '1 missing key: a; 1 unexpected key: b'
    """
    wrong = [
        f"{key} has shape {tuple(given[key].shape)}, the model needs {tuple(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    parts = [
        _listed("missing key", [key for key in expected if key not in given]),
        _listed("unexpected key", [key for key in given if key not in expected]),
        _listed("wrong shape", wrong),
    ]
    return "; ".join(part for part in parts if part) or None


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    rest = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{len(items)} {what}{'s' if len(items) > 1 else ''}: {', '.join(items[:5])}{rest}"


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> bool:
    """Load `tensors` into `model`, strictly, after what the model's own library does to published checkpoints.

    Where names or shapes differ, timm's filter for the model's family is tried (it renames the keys of the original
    releases and resamples position embeddings to another image size); a Hugging Face encoder's weights fit the models
    with a head on it. A classifier of another width, or none, is left out with a warning, since that is what
    fine-tuning to new classes means. `source` is named in errors.

    Returns whether the model's own classifier, a new one, stayed.

    Raises InputError that lists the missing and unexpected keys.
    """
    tensors = dict(tensors)
    expected = model.state_dict()
    new_head = False
    remarks: list[str] = []
    if mismatch(expected, tensors):
        tensors, new_head, remarks = _without_classifier(model, _family_filter(model, tensors))
    if problem := mismatch(expected, tensors):
        raise InputError(f"{source} does not fit {type(model).__name__}: {problem}")
    for remark in remarks:
        warnings.warn(remark, stacklevel=3)
    model.load_state_dict({**expected, **tensors}, strict=True)
    return new_head


def _family_filter(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if is_transformers(model):
        return _beside_head(model, tensors)
    family = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if family is None:
        return tensors
    try:
        return dict(family(dict(tensors), model))
    except Exception:  # A foreign file can break the filter anywhere; the list of keys is the better message.
        return tensors


def _beside_head(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a transformers encoder to those in `model`, which has a head on it; others stay."""
    encoder, _ = parts(model)
    if not encoder or any(key.startswith(f"{encoder}.") for key in tensors):
        return tensors
    expected, pooler = model.state_dict(), f"{encoder}.pooler."
    renamed = {f"{encoder}.{key}": tensor for key, tensor in tensors.items()}
    # A head that reads the tokens itself stands on an encoder without a pooler.
    return {key: tensor for key, tensor in renamed.items() if key in expected or not key.startswith(pooler)}


def _without_classifier(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool, list[str]]:
    """Keep the model's own classifier where the checkpoint has one of other classes, or none; say if so, and why."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or parts(model)[1]
    expected = model.state_dict()
    result, kept, remarks = dict(tensors), False, []
    for name in (names,) if isinstance(names, str) else names:
        mine, theirs = ({k: t for k, t in state.items() if k.startswith(f"{name}.")} for state in (expected, tensors))
        if theirs and all(_shape(mine.get(key)) == tensor.shape for key, tensor in theirs.items()):
            continue
        if theirs:
            classes = theirs[f"{name}.weight"].shape[0] if f"{name}.weight" in theirs else "other"
            remarks.append(f"the checkpoint's classifier {name!r} ({classes} classes) was left out")
        elif mine:
            remarks.append(f"the checkpoint has no classifier {name!r}: the model's own is new")
        result = {key: tensor for key, tensor in result.items() if key not in theirs} | mine
        kept |= bool(mine)
    return result, kept, remarks


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
