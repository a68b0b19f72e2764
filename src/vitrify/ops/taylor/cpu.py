"""Taylor attention on the CPU: blocks of tokens that stay in the cache, and no copy of any whole input.

Centring needs centred copies of K and V before their product. Made at full size they cost a quarter of the whole, in
fresh pages and trips to memory; made block by block in one reused buffer, a tenth. README.md has the measurements.
The same blocks convert float16 and bfloat16 inputs to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.ops.taylor import aten
from vitrify.ops.taylor.reference import AffineState

# Elements of one block over all heads: 1 MiB of float32, so that a block of K and one of V share the L2 caches.
BLOCK = 2**18


def forward(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, AffineState]:
    """Z = vbar + Q M as (B, H, Nq, Dv) in memory order (B, Nq, H, Dv), and the state for `backward`."""
    if query.numel() == 0:
        return aten.forward(query, key, value, keep, scale)
    axis = _axis(query, keep)
    out = tokens_first(query, query.shape[2], value.shape[3])
    states = []
    for i, (q, k, v, z) in enumerate(zip(*(t.unbind(axis) for t in (query, key, value, out)), strict=True)):
        if keep is None:
            state = _learn(k, v, scale)
        else:
            valid = keep[i].nonzero()[:, 0]
            state = _learn(k.index_select(1, valid), v.index_select(1, valid), scale)
        _apply(q, state.M, state.vbar, z)
        states.append(state)
    if len(states) == 1:
        return out, AffineState(*(tensor.unsqueeze(axis) for tensor in states[0]))
    return out, AffineState(*(torch.stack(tensors, axis) for tensors in zip(*states, strict=True)))


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, state: AffineState
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed-form gradients (dQ, dK, dV), each (B, H, N, D) in memory order (B, N, H, D)."""
    axis = _axis(query, keep)
    d_query, d_key, d_value = (tokens_first(t, t.shape[2], t.shape[3]) for t in (query, key, value))
    per_part = (t.unbind(axis) for t in (grad, query, key, value, *state, d_query, d_key, d_value))
    for i, (dz, q, k, v, M, kbar, vbar, dq, dk, dv) in enumerate(zip(*per_part, strict=True)):
        _apply(dz, M.mT, None, dq)
        valid = None if keep is None else keep[i].nonzero()[:, 0]
        n = k.shape[1] if valid is None else max(len(valid), 1)
        dM = _product(q, dz, scale / n, M.dtype)
        mean_dz = dz.sum(-2, keepdim=True, dtype=M.dtype).div_(n)
        for x, offset, matrix, bias, target in ((v, vbar, dM.mT, None, dk), (k, kbar, dM, mean_dz, dv)):
            if valid is None:
                _apply(x, matrix, bias, target, offset)
            else:
                rows = target.new_empty(target.shape[0], len(valid), target.shape[2])
                _apply(x.index_select(1, valid), matrix, bias, rows, offset)
                target.zero_().index_copy_(1, valid, rows)
    return d_query, d_key, d_value


def tokens_first(like: Tensor, tokens: int, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty (B, H, tokens, dim) in memory order (B, tokens, H, dim), with B, H and dtype of `like`."""
    return like.new_empty(like.shape[0], tokens, like.shape[1], dim, dtype=dtype).transpose(1, 2)


def _axis(query: Tensor, keep: Tensor | None) -> int:
    """Return the axis to work along one by one: 0, images, or 1, heads, if there are fewer of them.

    A packed qkv projection has different strides for images and heads: batched products take either axis as it is, and
    joining the two would copy the input. With a mask every image has its own keys.
    """
    return 1 if keep is None and query.shape[1] < query.shape[0] else 0


def _learn(key: Tensor, value: Tensor, scale: float) -> AffineState:
    """Return M, kbar and vbar of keys (G, n, D) and values (G, n, Dv), all valid; zeros if n is 0."""
    n, wide = key.shape[1], aten.accumulate_dtype(key.dtype)
    if n == 0:
        return AffineState(*(key.new_zeros(len(key), *size, dtype=wide) for size in _state_sizes(key, value)))
    kbar, vbar = key.mean(-2, keepdim=True, dtype=wide), value.mean(-2, keepdim=True, dtype=wide)
    return AffineState(_product(key, value, scale / n, wide, kbar, vbar), kbar, vbar)


def _state_sizes(key: Tensor, value: Tensor) -> tuple[tuple[int, int], ...]:
    return (key.shape[2], value.shape[2]), (1, key.shape[2]), (1, value.shape[2])


def _product(
    left: Tensor,
    right: Tensor,
    factor: float,
    wide: torch.dtype,
    lbar: Tensor | None = None,
    rbar: Tensor | None = None,
) -> Tensor:
    """Return factor * (left - lbar)^T (right - rbar), summed over the tokens (axis 1) block by block."""
    step = _block_tokens(left, right)
    left_buffer, right_buffer = _buffer(left, step, wide), _buffer(right, step, wide)
    total = left.new_zeros(left.shape[0], left.shape[2], right.shape[2], dtype=wide)
    for x, y in zip(_blocks(left, step), _blocks(right, step), strict=True):
        total.baddbmm_(_load(x, lbar, left_buffer, wide).mT, _load(y, rbar, right_buffer, wide), alpha=factor)
    return total


def _apply(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor, offset: Tensor | None = None) -> None:
    """out = bias + (x - offset) matrix, block by block; x and out may be narrower than `matrix`."""
    step = _block_tokens(x, out)
    buffer = _buffer(x, step, matrix.dtype)
    for source, target in zip(_blocks(x, step), _blocks(out, step), strict=True):
        block = _load(source, offset, buffer, matrix.dtype)
        product = target if target.dtype == matrix.dtype else torch.empty_like(target, dtype=matrix.dtype)
        if bias is None:
            torch.bmm(block, matrix, out=product)
        else:
            torch.baddbmm(bias, block, matrix, out=product)
        if product is not target:
            target.copy_(product)


def _blocks(x: Tensor, tokens: int) -> tuple[Tensor, ...]:
    return (x,) if x.shape[1] <= tokens else torch.split(x, tokens, 1)


def _block_tokens(*tensors: Tensor) -> int:
    return max(64, BLOCK // max(1, *(t.shape[0] * t.shape[2] for t in tensors)))


def _buffer(x: Tensor, tokens: int, wide: torch.dtype) -> Tensor | None:
    """Return memory for one block of `x` in dtype `wide`, or None if `x` is a single block."""
    if x.shape[1] <= tokens:
        return None
    # empty_like keeps the order of the input's strides, so that rows of all heads are read as they lie.
    return torch.empty_like(x[:, :tokens], dtype=wide)


def _load(block: Tensor, offset: Tensor | None, buffer: Tensor | None, wide: torch.dtype) -> Tensor:
    """Return block - offset in dtype `wide`, in `buffer` if there is one; the block itself if it will do."""
    memory = None if buffer is None else buffer[:, : block.shape[1]]
    if offset is not None:
        return torch.sub(block, offset, out=memory)
    if block.dtype == wide:
        return block
    return block.to(wide) if memory is None else memory.copy_(block)
