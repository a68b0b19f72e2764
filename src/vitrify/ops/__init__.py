"""The primitives as functions: plain PyTorch definitions, fast paths, and their torch.library registrations.

>>> import torch
>>> from vitrify.ops import taylor_attention
>>> query, key, value = torch.randn(3, 2, 12, 197, 64)  # three of (batch, heads, tokens, head_dim)
>>> taylor_attention(query, key, value).shape
torch.Size([2, 12, 197, 64])
"""

from vitrify.ops.taylor import (
    backends,
    selected_backend,
    sparse_mask,
    sparse_softmax_attention,
    taylor_attention,
    taylor_sparse_attention,
    taylor_squares_attention,
    taylor_weights,
)

__all__ = [
    "backends",
    "selected_backend",
    "sparse_mask",
    "sparse_softmax_attention",
    "taylor_attention",
    "taylor_sparse_attention",
    "taylor_squares_attention",
    "taylor_weights",
]
