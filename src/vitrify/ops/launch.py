"""What launches share: how heads are split between programs, what a device has, and tensors as arguments."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Tokens that one program sums at most: tensor cores cut off their float32 sums, and the error grows with the length.
MAX_CHUNK = 1024
# Tokens that one program takes alone even when the other processors have nothing to do: two more launches cost more.
SMALL = 512
# A head of more queries than this is shared between programs, however many heads there are.
MAX_QUERIES = 4096
# Programs per processor to aim for when heads are shared.
PROGRAMS = 4


class Plan(NamedTuple):
    """How many tokens a program takes: `reduce` keys (or queries, backward), `stream` tokens; None: whole heads."""

    reduce: int
    stream: int


def plan(heads: int, queries: int, keys: int, processors: int, *, divide: bool = False) -> Plan | None:
    """Return how to share heads between programs, or None where one program takes a whole head, in one launch.

    `divide` asks for separate launches in any case.
    """
    longest = max(queries, keys)
    alone = longest <= SMALL or (heads >= processors and keys <= MAX_CHUNK and queries <= MAX_QUERIES)
    if alone and not divide:
        return None
    share = -(-longest * heads // (PROGRAMS * processors))
    per_program = 1 << (share - 1).bit_length()
    return Plan(*(min(max(per_program, least), MAX_CHUNK) for least in (128, 256)))


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors; elsewhere than on a GPU the interpreter runs, and any number will do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 64


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have: 166,912 from compute capability 8.0, less on 8.6."""
    if device.type != "cuda":
        return 2**18
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def adjacent(matrix: Tensor) -> Tensor:
    """Return the matrix with rows whose entries are adjacent, copied only if they are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def strided(*tensors: Tensor) -> tuple[Tensor | tuple[int, ...], ...]:
    """Return every tensor followed by its strides, as the kernels take them."""
    return tuple(item for t in tensors for item in (t, t.stride()))


def mask_arguments(keep: Tensor | None) -> tuple[Tensor | None, tuple[int, ...]]:
    """Return the key-padding mask bool (B, Nk) as the kernels take it: bytes and strides, or None and strides."""
    return (None, (0, 1)) if keep is None else (keep.view(torch.uint8), keep.stride())
