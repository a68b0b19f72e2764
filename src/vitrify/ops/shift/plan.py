"""How the kernel that multiplies with codes in registers divides a layer: tiles, and inputs between programs.

Derived for an H100, not tuned: the plan follows from the shapes and the number of processors alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton

# Tile shapes: output channels, the most tokens, the most inputs of a step, and the most bytes of inputs of a step, so
# that four steps fit the 100 KB that every GPU since compute capability 8.0 has.
BLOCK_OUT, BLOCK_TOKENS, BLOCK_IN, STEP_BYTES = 64, 128, 128, 2**14
# The same for float32, whose three parts need registers, and for rows that wide loads cannot take: addresses need them.
BLOCK_TOKENS_FLOAT32, STEP_BYTES_FLOAT32 = 64, 2**13
BLOCK_TOKENS_RAGGED, BLOCK_IN_RAGGED = 32, 32
# What dividing the inputs between programs saves and costs in microseconds, for an H100 again: a step (450
# instructions of each of 4 warps, 0.25 us, of which other programs hide a part); one more launch; partial sums, which
# cross 3 TB/s twice.
STEP_US, LAUNCH_US, BYTES_PER_US = 0.2, 2.0, 3e6


class Plan(NamedTuple):
    """How to multiply with codes in registers: a tile's tokens, the inputs of a step, and the steps of a program."""

    block_tokens: int
    block_in: int
    steps: int


@functools.lru_cache(4096)
def plan(tokens: int, width: int, channels: int, item_bytes: int, processors: int) -> Plan:
    """Return the tiles for (tokens, width) inputs of `item_bytes` each and `channels` outputs.

    The inputs are divided between programs where that shortens the chain of steps by more than joining them costs.
    """
    single = item_bytes == 4
    most, step_bytes = (BLOCK_TOKENS_FLOAT32, STEP_BYTES_FLOAT32) if single else (BLOCK_TOKENS, STEP_BYTES)
    widest = BLOCK_IN
    if width % 32:
        most, widest = BLOCK_TOKENS_RAGGED, BLOCK_IN_RAGGED
    block_tokens = min(max(triton.next_power_of_2(tokens), 16), most)
    block_in = min(widest, step_bytes // (block_tokens * item_bytes))
    if width % block_in and width % 64 == 0:
        block_in = 64  # without masks
    steps: int = triton.cdiv(width, block_in)
    tiles: int = triton.cdiv(tokens, block_tokens) * triton.cdiv(channels, BLOCK_OUT)

    def cost(chunks: int) -> float:
        join: float = LAUNCH_US + 8 * chunks * tokens * channels / BYTES_PER_US
        return -(-steps // chunks) * STEP_US + (join if chunks > 1 else 0.0)

    chunks: int = min(range(1, max(1, min(processors // tiles, steps)) + 1), key=cost)
    return Plan(block_tokens, block_in, triton.cdiv(steps, chunks))
