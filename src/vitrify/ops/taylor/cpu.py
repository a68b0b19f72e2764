"""Taylor attention on the CPU: blocks of tokens that stay in the cache, and no copy of any whole input.

Centring needs a centred copy of K and V before their product. Made at full size it costs more than the product (fresh
pages, and a trip to memory); made block by block in one reused buffer it costs about a tenth of it. README.md has the
measurements. The same blocks convert float16 and bfloat16 inputs to float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vitrify.ops.taylor.aten import accumulate_dtype
from vitrify.ops.taylor.reference import AffineState

# Elements of one block over all heads: 1 MiB of float32, so that a block of K and one of V share the L2 caches.
BLOCK = 2**18


def forward(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, AffineState]:
    """Z = vbar + Q M as (B, H, Nq, Dv) in memory order (B, Nq, H, Dv), and the state for `backward`."""
    batch, heads, queries, dim = query.shape
    value_dim = value.shape[3]
    wide = accumulate_dtype(query.dtype)
    out = tokens_first(query, batch, queries, heads, value_dim)
    M = query.new_zeros(batch, heads, dim, value_dim, dtype=wide)
    kbar = query.new_zeros(batch, heads, 1, dim, dtype=wide)
    vbar = query.new_zeros(batch, heads, 1, value_dim, dtype=wide)
    for part, valid in _parts(query, keep):
        keys, values = _valid(key[part], valid), _valid(value[part], valid)
        _learn(keys, values, scale, AffineState(M[part], kbar[part], vbar[part]))
        _apply(query[part], M[part], vbar[part], out[part])
    return out, AffineState(M, kbar, vbar)


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None, scale: float, state: AffineState
) -> tuple[Tensor, Tensor, Tensor]:
    """The closed-form gradients (dQ, dK, dV), each (B, H, N, D) in memory order (B, N, H, D)."""
    d_query, d_key, d_value = (
        tokens_first(t, t.shape[0], t.shape[2], t.shape[1], t.shape[3]) for t in (query, key, value)
    )
    for part, valid in _parts(query, keep):
        M, kbar, vbar = (tensor[part] for tensor in state)
        keys, values = _valid(key[part], valid), _valid(value[part], valid)
        n = max(keys.shape[1], 1)
        _apply(grad[part], M.mT, None, d_query[part])
        dM = torch.zeros_like(M)
        _accumulate(query[part], grad[part], dM)
        dM *= scale / n
        mean_grad = grad[part].sum(-2, keepdim=True, dtype=M.dtype) / n
        if valid is None:
            _apply(values, dM.mT, None, d_key[part], offset=vbar)
            _apply(keys, dM, mean_grad, d_value[part], offset=kbar)
        else:
            for x, matrix, bias, offset, target in (
                (values, dM.mT, None, vbar, d_key[part]),
                (keys, dM, mean_grad, kbar, d_value[part]),
            ):
                rows = target.new_empty(keys.shape[0], keys.shape[1], target.shape[2])
                _apply(x, matrix, bias, rows, offset=offset)
                target.zero_().index_copy_(1, valid, rows)
    return d_query, d_key, d_value


def tokens_first(like: Tensor, batch: int, tokens: int, heads: int, dim: int) -> Tensor:
    """Return an empty (B, H, N, D) whose memory is laid out as (B, N, H, D), in the dtype of `like`."""
    return like.new_empty(batch, tokens, heads, dim).transpose(1, 2)


Part = tuple[slice | int, ...]


def _parts(query: Tensor, keep: Tensor | None) -> Iterator[tuple[Part, Tensor | None]]:
    """Split (B, H) into slices with one stride, which batched products take as they are: by image, or by head if fewer.

    A packed qkv projection has different strides for images and heads; joining the two axes would copy the input.
    With a mask every image has its own keys: their indices come along.
    """
    batch, heads = query.shape[:2]
    if keep is not None:
        for b in range(batch):
            yield (b,), keep[b].nonzero()[:, 0]
    elif batch <= heads:
        for b in range(batch):
            yield (b,), None
    else:
        for h in range(heads):
            yield (slice(None), h), None


def _valid(x: Tensor, valid: Tensor | None) -> Tensor:
    return x if valid is None else x.index_select(1, valid)


def _block_tokens(*tensors: Tensor) -> int:
    return max(64, BLOCK // max(t.shape[0] * t.shape[2] for t in tensors))


def _learn(key: Tensor, value: Tensor, scale: float, state: AffineState) -> None:
    """Fill M, kbar and vbar (all zero before) of one part from its valid keys (G, n, D) and values (G, n, Dv)."""
    M, kbar, vbar = state
    n = key.shape[1]
    if n == 0:
        return
    torch.sum(key, -2, keepdim=True, dtype=M.dtype, out=kbar).div_(n)
    torch.sum(value, -2, keepdim=True, dtype=M.dtype, out=vbar).div_(n)
    _accumulate(key, value, M, kbar, vbar)
    M *= scale / n


def _accumulate(
    left: Tensor, right: Tensor, total: Tensor, left_offset: Tensor | None = None, right_offset: Tensor | None = None
) -> None:
    """total += (left - left_offset)^T (right - right_offset), over the tokens (axis 1), block by block."""
    step = _block_tokens(left, right)
    left_buffer, right_buffer = _Buffer(left, step, total.dtype), _Buffer(right, step, total.dtype)
    for start in range(0, left.shape[1], step):
        x = left_buffer.load(left[:, start : start + step], left_offset)
        y = right_buffer.load(right[:, start : start + step], right_offset)
        total.baddbmm_(x.mT, y)


def _apply(x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor, offset: Tensor | None = None) -> None:
    """out = bias + (x - offset) matrix, block by block; `out` may have a narrower dtype than `matrix`."""
    step = _block_tokens(x, out)
    buffer, result = _Buffer(x, step, matrix.dtype), _Buffer(out, step, matrix.dtype)
    for start in range(0, x.shape[1], step):
        block = buffer.load(x[:, start : start + step], offset)
        target = out[:, start : start + step]
        product = result.view_for(target)
        if bias is None:
            torch.bmm(block, matrix, out=product)
        else:
            torch.baddbmm(bias, block, matrix, out=product)
        if product is not target:
            target.copy_(product)


class _Buffer:
    """One block's worth of memory in the sums' dtype, made when first needed and used for every block."""

    def __init__(self, like: Tensor, tokens: int, dtype: torch.dtype) -> None:
        self.like = like[:, :tokens]
        self.dtype = dtype
        self.memory: Tensor | None = None

    def view_for(self, block: Tensor) -> Tensor:
        """Return memory for `block`: itself if its dtype will do."""
        return block if block.dtype == self.dtype else self._memory(block)

    def load(self, block: Tensor, offset: Tensor | None) -> Tensor:
        """Return block - offset in the sums' dtype; the block itself if there is nothing to do."""
        if offset is not None:
            return torch.sub(block, offset, out=self._memory(block))
        return block if block.dtype == self.dtype else self._memory(block).copy_(block)

    def _memory(self, block: Tensor) -> Tensor:
        if self.memory is None:
            # empty_like keeps the order of the input's strides, so that rows of all heads are read as they lie.
            self.memory = torch.empty_like(self.like, dtype=self.dtype)
        return self.memory[:, : block.shape[1]]
