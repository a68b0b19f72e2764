"""What was computed from a packed weight, kept for as long as that weight stays what it was.

Nothing is stored in a module or on a tensor: state dicts, pickles and copies know nothing of it. An entry goes with its
codes, and is made anew after anything that PyTorch's version counter sees (load_state_dict, copy_), or other memory
(`codes.data = ...`). Writing through `codes.data` or a NumPy view is as invisible here as it is to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class _Entry:
    """The results for one pair of codes and exponents, as they were."""

    def __init__(self, codes: Tensor, exponent: Tensor) -> None:
        # Aliases hold on to the memory: its address cannot come to mean other codes. They do not keep `codes` alive.
        self.aliases = (codes.detach(), exponent.detach())
        self.versions = (codes._version, exponent._version)
        self.results: dict[Hashable, Any] = {}

    def fits(self, codes: Tensor, exponent: Tensor) -> bool:
        """Say whether nothing has changed."""
        same_memory = all(
            alias.is_set_to(tensor) for alias, tensor in zip(self.aliases, (codes, exponent), strict=True)
        )
        return same_memory and self.versions == (codes._version, exponent._version)


_entries: MutableMapping[Tensor, _Entry] = WeakTensorKeyDictionary()


def recall(codes: Tensor, exponent: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """Return `make()`, or what it returned for these tensors and this `key`, which says all else that it depends on."""
    if codes.is_inference() or exponent.is_inference():
        return make()  # such tensors do not count their versions
    entry = _entries.get(codes)
    if entry is None or not entry.fits(codes, exponent):
        entry = _entries[codes] = _Entry(codes, exponent)
    if key not in entry.results:
        # Made in inference_mode, a result could not serve autograd later.
        with torch.inference_mode(False), torch.no_grad():
            entry.results[key] = make()
    result: T = entry.results[key]
    return result


def forget(codes: Tensor) -> None:
    """Free what is kept for these codes."""
    _entries.pop(codes, None)
