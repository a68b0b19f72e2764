"""The primitives as functions: plain PyTorch definitions, fast paths, and their torch.library registrations.

>>> import torch
>>> from vitrify.ops import taylor_attention
>>> query, key, value = torch.randn(3, 2, 12, 197, 64)  # three of (batch, heads, tokens, head_dim)
>>> taylor_attention(query, key, value).shape
torch.Size([2, 12, 197, 64])
"""

from vitrify.ops.experts import balance_losses, dispatch, route
from vitrify.ops.hamming import hamming_attention
from vitrify.ops.shift import pack_codes, shift_decode, shift_linear, shift_quantize, shift_ste, unpack_codes
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
    "balance_losses",
    "dispatch",
    "hamming_attention",
    "pack_codes",
    "route",
    "selected_backend",
    "shift_decode",
    "shift_linear",
    "shift_quantize",
    "shift_ste",
    "sparse_mask",
    "sparse_softmax_attention",
    "taylor_attention",
    "taylor_sparse_attention",
    "taylor_squares_attention",
    "taylor_weights",
    "unpack_codes",
]
