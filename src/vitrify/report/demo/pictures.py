"""What the demo's pictures are made of: attention maps, and images with the models' answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.artefact import input_config
from vitrify.report.capture import Seen, capture, weight_maps
from vitrify.report.gallery import Example


def attention_maps(original: Any, tuned: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return maps of softmax and Taylor weights by title, each (images, grid height, grid width).

    First those of the centre patch in the last block, averaged and per head; then of every block, averaged over the
    heads and over all tokens as queries.
    """
    kinds: dict[str, tuple[list[Seen], Callable[[Seen], Tensor]]] = {
        "softmax": (list(capture(original, images).values()), Seen.softmax_weights),
        "Taylor": (list(capture(tuned, images).values()), Seen.taylor_weights),
    }
    grid, prefix = original.patch_embed.grid_size, original.num_prefix_tokens
    centre = prefix + grid[0] // 2 * grid[1] + grid[1] // 2
    heads: dict[str, Tensor] = {}
    blocks: dict[str, Tensor] = {}
    last = {kind: weights(seen[-1]) for kind, (seen, weights) in kinds.items()}
    from_centre = {k: weight_maps(w, grid=grid, num_prefix_tokens=prefix, query=centre) for k, w in last.items()}
    heads |= {f"{kind}\nmean of heads": maps.mean(1) for kind, maps in from_centre.items()}
    for head in range(next(iter(from_centre.values())).shape[1]):
        heads |= {f"{kind}\nhead {head + 1}": maps[:, head] for kind, maps in from_centre.items()}
    for block in range(len(kinds["softmax"][0])):
        for kind, (seen, weights) in kinds.items():
            maps = weight_maps(weights(seen[block]), grid=grid, num_prefix_tokens=prefix, query=None)
            blocks[f"{kind}\nblock {block + 1}"] = maps.mean(1)
    return heads, blocks


def examples(
    test: Any, predictions: dict[str, Tensor], labels: Tensor, model: nn.Module, seed: int, count: int = 6
) -> list[Example]:
    """Return the first images on which the models disagree, then as many at random."""
    answers = torch.stack(list(predictions.values()))
    disputed = (answers != answers[0]).any(dim=0).nonzero().flatten()[:count]
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    short = ("softmax", "zero-shot", "tuned")
    return [
        Example(
            pixels(test[index][0], model),
            test.classes[labels[index]],
            {name: test.classes[answer] for name, answer in zip(short, answers[:, index].tolist(), strict=True)},
        )
        for index in [*disputed.tolist(), *drawn.tolist()]
    ]


def pixels(image: Tensor, model: nn.Module) -> Tensor:
    """Undo the normalisation: (channels, height, width) in [0, 1]."""
    setup = input_config(model)
    mean, std = (torch.tensor(setup[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (image * std + mean).clamp(0, 1)
