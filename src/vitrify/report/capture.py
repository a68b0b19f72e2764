"""What the attention cores of a converted model see: queries, keys and values, and the weights and logits they make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.bench.observe import named_cores, observe_cores
from vitrify.errors import InputError
from vitrify.nn.cores import Core
from vitrify.ops import taylor_weights


@dataclass(frozen=True)
class Seen:
    """One call of a core: query, key, value (batch, heads, tokens, head_dim), and the scale of its logits."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    def softmax_weights(self) -> Tensor:
        """Return the softmax weights (batch, heads, queries, keys)."""
        return (self.query @ self.key.mT * self.scale).softmax(dim=-1)

    def taylor_weights(self) -> Tensor:
        """Return the Taylor weights (1 + x) / n, (batch, heads, queries, keys): rows sum to 1, some may be negative."""
        return taylor_weights(self.query, self.key, scale=self.scale)

    def logits(self, *, centred: bool) -> Tensor:
        """Return scale q.k, with the keys centred over the tokens or not; (batch, heads, queries, keys)."""
        key = self.key - self.key.mean(dim=-2, keepdim=True) if centred else self.key
        return self.query @ key.mT * self.scale


@torch.no_grad()
def capture(model: nn.Module, images: Tensor) -> dict[str, Seen]:
    """Run a converted model once and return what each core saw, by the core's name, as float32.

    Raises:
        InputError: the model has no vitrify core: convert it first, with `recipes.softmax()` to change nothing.
    """
    names = {core: name for name, core in named_cores(model).items()}
    if not names:
        raise InputError("the model has no attention core of vitrify's: convert_(model, recipes.softmax()) adds them")
    seen: dict[str, Seen] = {}

    def keep(core: Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key, value = (tensor.detach().float() for tensor in args[:3])
        seen[names[core]] = Seen(query, key, value, float(kwargs["scale"]))

    with observe_cores(model, keep):
        model(images)
    return seen


@dataclass(frozen=True)
class LogitHistogram:
    """How one core's logits are distributed over `edges`, as densities, and which share lies in [-1, 1)."""

    name: str
    edges: Tensor
    raw: Tensor
    centred: Tensor
    raw_share: float
    centred_share: float

    @property
    def module(self) -> str:
        """The name of the attention module that owns the core."""
        return self.name.removesuffix(".core")


def logit_histograms(
    model: nn.Module, batches: Iterable[Tensor], *, limit: float = 10, bins: int = 96
) -> list[LogitHistogram]:
    """Collect the logits of every core over batches of images: the paper's Fig. 3, with the share of weak attention.

    Args:
        model: a converted model in eval mode.
        batches: image batches (batch, channels, height, width).
        limit: the histogram covers [-limit, limit]; what lies outside is counted in the shares only.
        bins: number of bins over that range.
    """
    counts: dict[str, Tensor] = {}
    for images in batches:
        for name, seen in capture(model, images).items():
            row = counts.setdefault(name, torch.zeros(2, bins + 2, dtype=torch.float64))
            for index, centred in enumerate((False, True)):
                logits = seen.logits(centred=centred).flatten()
                row[index, :bins] += torch.histc(logits, bins, -limit, limit).double()
                row[index, bins] += ((logits >= -1) & (logits < 1)).sum()
                row[index, bins + 1] += logits.numel()
    edges = torch.linspace(-limit, limit, bins + 1)
    width = 2 * limit / bins
    return [
        LogitHistogram(
            name=name,
            edges=edges,
            raw=row[0, :bins] / row[0, -1] / width,
            centred=row[1, :bins] / row[1, -1] / width,
            raw_share=(row[0, bins] / row[0, -1]).item(),
            centred_share=(row[1, bins] / row[1, -1]).item(),
        )
        for name, row in counts.items()
    ]


def weight_maps(weights: Tensor, *, grid: tuple[int, int], num_prefix_tokens: int, query: int | None) -> Tensor:
    """Return attention over the patch grid, times the number of keys, so that 1 is uniform attention.

    Args:
        weights: (batch, heads, tokens, tokens).
        grid: height and width of the patch grid.
        num_prefix_tokens: class, distillation and register tokens before the patches.
        query: the token whose weights to show (a class token is 0); None averages over all tokens.

    Returns:
        (batch, heads, grid height, grid width).
    """
    row = weights.mean(dim=2) if query is None else weights[:, :, query]
    return (row[..., num_prefix_tokens:] * weights.shape[-1]).reshape(*weights.shape[:2], *grid)
