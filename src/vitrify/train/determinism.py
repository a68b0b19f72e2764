"""Randomness without history: each draw depends on (seed, epoch, step, process) alone, never on what ran before.

So a checkpoint needs no generator states, and a killed run ends as it would have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python, NumPy (mixup) and torch (dropout, drop-path) for one optimiser step of one process."""
    state = int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def permutation(count: int, seed: int, stream: int) -> list[int]:
    """Return a random order of `count` items: the same for the same (seed, stream), whatever was drawn before."""
    return np.random.default_rng([seed, stream]).permutation(count).tolist()  # type: ignore[no-any-return]


class EpochBatches(Sampler[list[int]]):
    """One process's share of each batch of one epoch, from `first_step` on; a last, incomplete batch is dropped."""

    def __init__(
        self, num_samples: int, batch_size: int, *, seed: int, epoch: int, rank: int, world_size: int, first_step: int
    ) -> None:
        self._order = permutation(num_samples, seed, epoch)
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._steps = range(first_step, num_samples // batch_size)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            batch = self._order[step * self._batch_size : (step + 1) * self._batch_size]
            yield batch[self._rank :: self._world_size]
