"""Which rays and points of a picture multiply: where the mixtures of a GNT send their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.nn import Mixture
from vitrify.nvs.model import GNT
from vitrify.nvs.render import Progress, render
from vitrify.nvs.scene import Scene, View


def routing_maps(
    model: GNT,
    scene: Scene,
    target: View,
    sources: Sequence[int],
    *,
    chunk: int = 1024,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Render a view and return, by the mixture's name, (H, W, P) bool: True where a point went to multiplication.

    P are the points of a ray from near to far. Arguments as `render`'s. Raises InputError without a mixture, and for a
    model with a second pass, whose points lie elsewhere on each ray.
    """
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}
    if not mixtures:
        raise InputError("the model has no mixture: convert_(model, recipes.vitrify()) makes its MLPs mixtures")
    if model.architecture.fine_points:
        raise InputError("routing is shown for models with one pass over evenly spread points: fine_points=0")
    seen: dict[str, list[Tensor]] = {name: [] for name in mixtures}
    latest: dict[str, Tensor] = {}

    def note(name: str, router: nn.Module, inputs: tuple[Tensor], logits: Tensor) -> None:
        # Experts are in the router's order; the first multiplies.
        latest[name] = (logits.argmax(-1) == 0).cpu()

    def keep(*_: object) -> None:
        # When the rays are traced: depth maps call a part of the last block again, later.
        for name, multiplies in latest.items():
            seen[name].append(multiplies)

    hooks = [mixture.router.register_forward_hook(partial(note, name)) for name, mixture in mixtures.items()]
    hooks.append(model.coarse.register_forward_hook(keep))
    try:
        render(model, scene, target, sources, chunk=chunk, progress=progress)
    finally:
        for hook in hooks:
            hook.remove()
    size = target.height, target.width, model.architecture.points
    return {name: torch.cat(parts).reshape(size) for name, parts in seen.items()}
