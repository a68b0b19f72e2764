"""Random augmentation as a function of (seed, epoch, index) alone."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset


class SizedDataset(Protocol):
    """A map-style dataset of known length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class DeterministicDataset(Dataset[Any]):
    """Wraps a dataset so that item i of epoch e is the same whatever was read before it, and in whichever worker.

    Python's, NumPy's and PyTorch's (CPU) generators are seeded from (seed, epoch, index) for each item, and given back
    as they
    were: the caller's random numbers are not disturbed. Attributes of the wrapped dataset (`classes`, `source`, ...)
    show through.

    >>> data = DeterministicDataset(dataset, seed=0)
    >>> data.set_epoch(3)  # before iterating over the loader, as with DistributedSampler
    """

    def __init__(self, dataset: SizedDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        # In shared memory, so that set_epoch() also reaches persistent workers.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the following items belong to."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return the items of a batch; DataLoader's workers call this, and the generators are saved once per batch."""
        epoch = int(self._epoch)
        items = []
        with _generators_restored():
            for index in indices:
                _seed_generators(_mix(self.seed, epoch, int(index)))
                items.append(self.dataset[index])
        return items

    def __getattr__(self, name: str) -> Any:
        # Only called for what this object lacks; "dataset" itself is lacking while unpickling in a worker.
        if name.startswith("_") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _mix(*numbers: int) -> int:
    """Hash integers to 64 bits: neighbouring seeds, epochs and indices must not give related streams."""
    return int.from_bytes(hashlib.blake2b(struct.pack(f"<{len(numbers)}q", *numbers), digest_size=8).digest(), "little")


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextmanager
def _generators_restored() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
