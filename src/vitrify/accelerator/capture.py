"""Masks of sparse attention, read off a trained softmax model on real images.

>>> import timm, torch, vitrify.models
>>> model = timm.create_model("vit_mini_patch2_28", pretrained=True)
>>> masks = capture_masks(model, torch.randn(3, 1, 28, 28), density=0.25)
>>> masks["blocks.0.attn"].shape, round(masks.density, 2)
((3, 2, 196, 196), 0.25)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vitrify.accelerator.masks import LayerMask, Masks
from vitrify.convert import convert_
from vitrify.convert.copies import detached_copy
from vitrify.convert.recipes import softmax
from vitrify.errors import InputError, UnsupportedError, VitrifyError
from vitrify.nn.attention import named_cores
from vitrify.ops.taylor import sparse

CHUNK = 8
"""Images that `capture_masks` runs at a time."""


def capture_masks(
    model: nn.Module, images: Tensor, *, threshold: float | None = None, density: float | None = None
) -> Masks:
    """Return what Sanger's predictor keeps in every attention layer of a softmax model, on real images.

    The predictor is that of `ops.sparse_mask`: queries and centred keys in 4 bits, their scaled product, softmax, a
    threshold. A copy of the model runs in eval mode; the original is neither run nor changed.

    model       a ViT whose attention classes `convert_` knows, with trained weights; biases on the logits are not seen
                by the predictor
    images      (N, channels, height, width), preprocessed as the model wants them
    threshold   keep entries of at least this predicted probability, or
    density     keep this share of all entries, by one threshold for the whole model; 8 bytes of memory per entry
    Raises InputError unless exactly one of the two is given and in range, UnsupportedError for a model with attention
    that `convert_` refuses, or with a mask on its attention.
    """
    if (threshold is None) == (density is None):
        raise InputError("give either the threshold of the predicted probability or the density to reach")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"threshold must be a probability, not {threshold}")
    if density is not None and not 0 < density <= 1:
        raise InputError(f"density must be a share above 0 and at most 1, not {density}")
    if images.dim() != 4 or not len(images):
        raise InputError(f"images must be (N, channels, height, width), not {tuple(images.shape)}")
    observed = detached_copy(model).eval()
    _observable(observed)
    found: dict[str, list[Any]] = {}

    def see(name: str, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool) -> None:
        if mask is not None or is_causal:
            raise UnsupportedError(f"{name} has a mask on its attention: only full attention can be captured")
        query, key = query.float(), key.float()
        predicted = sparse.probabilities(query, key - key.mean(-2, keepdim=True), None, scale, bits=4).cpu()
        seen: Any = predicted.numpy() if threshold is None else LayerMask.of((predicted >= threshold).numpy())
        found.setdefault(name, []).append(seen)

    for core_name, core in named_cores(observed).items():
        name = core_name.rpartition(".")[0]

        def hook(_core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            see(name, args[0], args[1], mask, kwargs["scale"], kwargs.get("is_causal", False))

        core.register_forward_pre_hook(hook, with_kwargs=True)
    _run(observed, images)
    of_what = f"captured: {type(model).__name__}, {len(images)} images"
    if threshold is None:
        assert density is not None
        threshold = _threshold_for(found, density)
        found = {name: [LayerMask.of(p >= threshold) for p in parts] for name, parts in found.items()}
        of_what += f", density {density:g}"
    layers = {n: LayerMask(np.concatenate([part.packed for part in p]), p[0].keys) for n, p in found.items()}
    return Masks(layers, f"{of_what}, predicted probability at least {threshold:.3g}")


def _run(model: nn.Module, images: Tensor) -> None:
    try:
        with torch.no_grad():
            images = images.to(next(model.parameters()))
            for start in range(0, len(images), CHUNK):
                model(images[start : start + CHUNK])
    except VitrifyError:
        raise
    except Exception as error:  # any model may be given, and may fail in any way
        raise InputError(f"the model does not take images of {tuple(images.shape[1:])}: {error}") from error


def _observable(model: nn.Module) -> None:
    """Convert the model to softmax cores that can be observed."""
    conversion = convert_(model, softmax())
    if conversion.refused:
        refused = conversion.refused[0]
        raise UnsupportedError(f"{refused.name} ({refused.module_class}) cannot be observed: {refused.detail}")
    if not named_cores(model):
        raise UnsupportedError(f"{type(model).__name__} has no attention that vitrify knows")


def _threshold_for(found: Mapping[str, Sequence[npt.NDArray[np.float32]]], density: float) -> float:
    """Return the greatest threshold that keeps at least that share of all entries."""
    every = np.concatenate([part.ravel() for parts in found.values() for part in parts])
    dropped = every.size - math.ceil(density * every.size)
    every.partition(dropped)
    return float(every[dropped])
