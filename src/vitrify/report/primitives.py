"""What the primitives of a converted model do: which tokens multiply, which exponents weights have, which bits codes.

Plain data for figures; `gallery` and `plots` draw it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn import Hamming, Mixture, ShiftConv2d, ShiftLinear
from vitrify.ops.experts import route

MOST_PREFIX_TOKENS = 8
"""Class, distillation and register tokens, where a model does not say how many: DINOv2 has the most, 5."""


@torch.no_grad()
def dispatch_maps(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Run a model in eval mode once and return which patches each mixture multiplied: ShiftAddViT's Fig. 9.

    Args:
        model: with mixtures whose tokens come as (images, tokens, width).
        images: (images, channels, height, width).

    Returns:
        Name of each mixture that ran -> (images, grid height, grid width) bool, True where the token went to the first
        expert, which multiplies. Prefix tokens are left out.

    Raises:
        InputError: the model has no mixture.
        UnsupportedError: tokens lie in another order, or fill no grid of the images' proportions.
    """
    mixtures = {name: [module.router] for name, module in model.named_modules() if isinstance(module, Mixture)}
    if not mixtures:
        raise InputError("the model has no mixture: convert_(model, recipes.vitrify()) makes its MLPs mixtures")
    maps = {}
    for name, outputs in _outputs(model, images, mixtures).items():
        logits = outputs[-1]
        if logits.dim() != 3 or len(logits) != len(images):
            raise UnsupportedError(
                f"{name} routes tokens of shape {tuple(logits.shape[:-1])}, not (images, tokens) with {len(images)} "
                "images: which token is which patch is unknown"
            )
        maps[name] = _on_grid(route(logits)[0] == 0, 1, name, model, images)
    return maps


def target_share(mixture: Mixture) -> float:
    """Return the part of the tokens at which the latency-aware loss wants the multiplying expert: 1 / alpha, scaled."""
    speeds = [1 / alpha for alpha in mixture.alpha]
    return speeds[0] / sum(speeds)


@dataclass(frozen=True)
class ExponentCounts:
    """How many weights of one shift layer are +-2^P: `counts[i]` (int64) have P = lowest + i, and `zeros` are 0."""

    lowest: int
    counts: Tensor
    zeros: int

    @property
    def shares(self) -> Tensor:
        """`counts` as float64 shares of all weights of the layer."""
        return self.counts.double() / self.total

    @property
    def zero_share(self) -> float:
        """The share of weights that are 0."""
        return self.zeros / self.total

    @property
    def total(self) -> int:
        """The number of weights."""
        return int(self.counts.sum()) + self.zeros


def exponent_counts(model: nn.Module) -> dict[str, ExponentCounts]:
    """Count the exponents P in every shift layer of `model`, packed or not, by the layer's name.

    Raises InputError if the model has no shift layer.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (ShiftLinear, ShiftConv2d))}
    if not layers:
        raise InputError("the model has no shift layer: convert_(model, recipes.vitrify()) makes some")
    return {name: _count(layer.decoded_weight()) for name, layer in layers.items()}


def _count(weight: Tensor) -> ExponentCounts:
    values = weight[weight != 0].float()
    power = torch.frexp(values).exponent.long() - 1  # exact: every value is +-2^P
    lowest = int(power.min()) if len(power) else 0
    return ExponentCounts(lowest, torch.bincount(power - lowest).cpu(), weight.numel() - len(values))


@dataclass(frozen=True)
class CodeMaps:
    """The codes of one attention: of the queries and of the keys, each (images, heads, bits, grid height, grid width).

    bool, True for 1; the keys' grid is the smaller one where keys are reduced (PVT).
    """

    query: Tensor
    key: Tensor


@torch.no_grad()
def code_maps(model: nn.Module, images: Tensor) -> dict[str, CodeMaps]:
    """Run a model in eval mode once and return the codes in each of its Hamming cores, by the core's name.

    images: (images, channels, height, width). Prefix tokens are left out.
    Raises InputError if the model has no Hamming core, UnsupportedError if tokens fill no grid of the images'
    proportions.
    """
    cores = {
        name: [b for b in (module.query_binariser, module.key_binariser) if b is not None]
        for name, module in model.named_modules()
        if isinstance(module, Hamming)
    }
    if not cores:
        raise InputError("the model has no Hamming core: convert it with attention 'hamming' and calibrate it")
    maps = {}
    for name, outputs in _outputs(model, images, cores).items():
        # Queries come first, also where both share one binariser.
        query, key = (_on_grid(codes > 0, 2, name, model, images).permute(0, 1, 4, 2, 3) for codes in outputs[-2:])
        maps[name] = CodeMaps(query, key)
    return maps


def balanced_channels(codes: Tensor, count: int) -> list[int]:
    """Return the `count` most balanced bits of codes (images, bits, height, width): a constant one shows nothing."""
    imbalance = (codes.float().mean((0, 2, 3)) - 0.5).abs()
    chosen: list[int] = imbalance.argsort(stable=True)[:count].tolist()
    return chosen


def _outputs(model: nn.Module, images: Tensor, modules: Mapping[str, Iterable[nn.Module]]) -> dict[str, list[Tensor]]:
    """Run `model` once and return, by name, what the modules of that name returned, in the order they were called."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, []).append(output.detach())

    handles = [module.register_forward_hook(keep(name)) for name, group in modules.items() for module in group]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in modules if name in seen}


def _on_grid(values: Tensor, axis: int, name: str, model: nn.Module, images: Tensor) -> Tensor:
    """Drop the prefix tokens along `axis` and unfold the others into the patch grid, on the CPU.

    Prefix tokens are as many as the model says, or the fewest that leave a grid.
    """
    tokens = values.shape[axis]
    declared = getattr(model, "num_prefix_tokens", 0)
    for prefix in dict.fromkeys((declared, *range(min(MOST_PREFIX_TOKENS + 1, tokens)))):
        grid = _grid(tokens - prefix, images.shape[-2], images.shape[-1])
        if grid is not None:
            shape = (*values.shape[:axis], *grid, *values.shape[axis + 1 :])
            return values.narrow(axis, prefix, tokens - prefix).reshape(shape).cpu()
    raise UnsupportedError(
        f"{name} has {tokens} tokens, which fill no patch grid of images of {images.shape[-2]} x {images.shape[-1]}"
    )


def _grid(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Return the (rows, columns) that square patches of some size cut such an image into, if they make `patches`."""
    for size in range(1, max(height, width) + 1):
        for grid in ((height // size, width // size), (-(-height // size), -(-width // size))):
            if grid[0] * grid[1] == patches > 0:
                return grid
    return None
