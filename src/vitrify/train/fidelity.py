"""How close a converted encoder is to the original: cosines of its features, and agreement of nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.train.features import cosine, encode
from vitrify.train.tasks import images_of, to_device

_CHUNK = 1024


@torch.no_grad()
def evaluate_against(original: nn.Module, model: nn.Module, loader: Iterable[Any], *, k: int = 10) -> dict[str, float]:
    """Compare the features of `model` with those of `original` on the same images, both in eval mode.

    Batches are images (B, C, H, W), or (images, labels) where a label below 0 means none. Returns:
        token_cosine_mean, token_cosine_min: cosine similarity over all output tokens of all images.
        pooled_cosine_mean, pooled_cosine_min: the same of the pooled features.
        knn_overlap: share of the k nearest neighbours (cosine of pooled features) that the two have in common.
        nearest_agreement: share of images whose nearest neighbour is the same image in both.
        knn_accuracy_original, knn_accuracy_model: leave-one-out accuracy of the vote of k neighbours, with labels only.
        images: how many there were.

    Raises InputError for fewer than k + 1 images, and for models whose features have different shapes.
    """
    modes = [(m, m.training) for m in (original, model)]
    original.eval(), model.eval()
    tokens: list[Tensor] = []
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: list[Tensor] = []
    for batch in loader:
        first = [encode(m, to_device(images_of(batch), next(m.parameters()).device)) for m in (original, model)]
        (tokens_a, pooled_a), (tokens_b, pooled_b) = [(t.cpu(), p.float().cpu()) for t, p in first]
        if tokens_a.shape != tokens_b.shape or pooled_a.shape != pooled_b.shape:
            raise InputError(f"features differ in shape: {tuple(tokens_a.shape)} and {tuple(tokens_b.shape)}")
        tokens.append(cosine(tokens_a, tokens_b).flatten())
        pooled[0].append(pooled_a)
        pooled[1].append(pooled_b)
        if isinstance(batch, (tuple, list)):
            labels.append(torch.as_tensor(batch[1]))
    for m, was_training in modes:
        m.train(was_training)
    features = [torch.cat(parts) if parts else torch.empty(0, 1) for parts in pooled]
    count = len(features[0])
    if count <= k:
        raise InputError(f"kNN agreement with k={k} needs at least {k + 1} images, not {count}")
    neighbours = [_neighbours(f, k) for f in features]
    token_cosines, pooled_cosines = torch.cat(tokens), cosine(features[0], features[1])
    common = (neighbours[0][:, :, None] == neighbours[1][:, None, :]).any(2)
    result = {
        "token_cosine_mean": token_cosines.mean().item(),
        "token_cosine_min": token_cosines.min().item(),
        "pooled_cosine_mean": pooled_cosines.mean().item(),
        "pooled_cosine_min": pooled_cosines.min().item(),
        "knn_overlap": common.float().mean().item(),
        "nearest_agreement": (neighbours[0][:, 0] == neighbours[1][:, 0]).float().mean().item(),
        "images": float(count),
    }
    if labels and int((all_labels := torch.cat(labels)).min()) >= 0:
        for name, found in zip(("original", "model"), neighbours, strict=True):
            votes = all_labels[found].mode(1).values
            result[f"knn_accuracy_{name}"] = (votes == all_labels).float().mean().item()
    return result


def _neighbours(features: Tensor, k: int) -> Tensor:
    """Return the indices (images, k) of each image's nearest other images, nearest first."""
    unit = F.normalize(features, dim=1)
    found = []
    for start in range(0, len(unit), _CHUNK):
        similarity = unit[start : start + _CHUNK] @ unit.T
        rows = torch.arange(len(similarity))
        similarity[rows, rows + start] = -torch.inf
        found.append(similarity.topk(k, dim=1).indices)
    return torch.cat(found)
