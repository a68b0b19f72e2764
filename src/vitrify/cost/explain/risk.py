"""What a primitive does to a model's output before any fine-tuning: each group converted alone, on real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitrify.cost.explain.groups import Group, Layout
from vitrify.cost.explain.variants import InputSize, Primitive, convert
from vitrify.errors import InputError
from vitrify.nn.copying import copy_without_hooks

Progress = Callable[[str], None]


@torch.no_grad()
def risks(
    model: nn.Module,
    layout: Layout,
    tries: list[tuple[Group, Primitive]],
    images: Tensor,
    input_size: InputSize,
    progress: Progress,
) -> Mapping[tuple[Group, Primitive], float]:
    """Return the mean cosine between the outputs of the model and of a copy in which one group has one primitive.

    images: (images, channels, height, width), prepared as the model expects; at least one. fp8 has no module, and is
    left out. Raises InputError for a model without weights, and for images of another size.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError("the risk is measured on real weights, and this model has none: it is on the meta device")
    if images.dim() != 4 or not len(images) or tuple(images.shape[1:]) != input_size:
        raise InputError(f"images must be (images, {', '.join(map(str, input_size))}), not {tuple(images.shape)}")
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    images = images.to(weight.device, weight.dtype)
    original = copy_without_hooks(model).eval()
    expected = _output(original, images)
    found: dict[tuple[Group, Primitive], float] = {}
    for group, primitive in tries:
        if primitive == "fp8":
            continue
        progress(f"risk of {primitive} in {group}, {len(images)} images")
        converted = copy_without_hooks(model).eval()
        if convert(converted, layout, {group: primitive}, input_size):
            found[group, primitive] = float(F.cosine_similarity(_output(converted.eval(), images), expected).mean())
    return found


def _output(model: nn.Module, images: Tensor) -> Tensor:
    """Return one row of numbers an image: what the model returns, or the first tensor in it."""
    rows = [
        next(leaf for leaf in tree_leaves(model(part)) if isinstance(leaf, Tensor)) for part in torch.split(images, 8)
    ]
    return torch.cat(rows).flatten(1).double()
