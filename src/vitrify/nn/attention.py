"""Attention with a swappable core: the base that adapters of foreign classes share, and a module of our own."""

from __future__ import annotations

from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.nn.cores import Core, Dropout, Taylor
from vitrify.nn.value_conv import ValueConv


class CoreAttention(nn.Module):
    """An attention module that computes q, k, v itself and leaves the rest to `core` and, if present, `value_conv`."""

    core: Core
    value_conv: ValueConv | None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        """Return core(query, key, value) plus the convolution of V; shapes in `nn.cores`.

        grid: (height, width, num_prefix_tokens) of the tokens, needed with a value_conv.
        """
        out: Tensor = self.core(
            query,
            key,
            value,
            attn_mask,
            scale=scale,
            dropout_p=dropout_p,
            dropout=dropout,
            bias=bias,
            is_causal=is_causal,
        )
        if self.value_conv is None:
            return out
        if grid is None:
            raise InputError("value_conv needs the token grid: grid=(height, width, num_prefix_tokens)")
        return out + self.convolve(value, grid, attn_mask, is_causal)

    def convolve(
        self, value: Tensor, grid: tuple[int, int, int], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return the convolution of value (B, H, Nk, Dv), one row per query; override it where Nq differs from Nk."""
        assert self.value_conv is not None
        convolved: Tensor = self.value_conv(value, *grid, attn_mask=attn_mask, is_causal=is_causal)
        return convolved


def named_cores(model: nn.Module) -> dict[str, Core]:
    """Return the attention cores of a converted model by their names, in the order of the model's modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Core)}


class Attention(CoreAttention):
    """Multi-head self-attention around any core, for models of your own; `convert_` handles existing ones.

    embed_dim   width of the tokens; num_heads divides it
    core        `Taylor()` by default
    value_conv  odd kernel size of the depth-wise convolution on V, 0 for none

    >>> import torch
    >>> Attention(64, num_heads=4)(torch.randn(2, 197, 64)).shape
    torch.Size([2, 197, 64])
    """

    def __init__(
        self, embed_dim: int, num_heads: int, core: Core | None = None, qkv_bias: bool = True, value_conv: int = 0
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise InputError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.core = Taylor() if core is None else core
        self.value_conv = ValueConv(embed_dim, value_conv) if value_conv else None
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
    ) -> Tensor:
        """Attend over x (B, N, embed_dim) -> the same shape; attn_mask as the core takes it; grid (height, width)."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        out = self.attend(
            query,
            key,
            value,
            attn_mask,
            scale=self.head_dim**-0.5,
            grid=None if grid is None else (*grid, num_prefix_tokens),
        )
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return projected
