"""timm's plain attention: ViT, DeiT, DeiT-III, DINOv2, SigLIP, hybrids, PiT, and the transformers inside MobileViT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from vitrify.convert.adapters.base import Adapter, watching
from vitrify.nn import Softmax, TokenGrid


class ViTAttention(Adapter, Attention):  # type: ignore[misc]  # timm has no types
    """Projections, query and key norms, gate and scale norm as in timm; the attention itself is the core's."""

    source = Attention

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over x (B, N, C); the source's call."""
        B, N, _ = x.shape
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = self.attend(
            self.q_norm(q),
            self.k_norm(k),
            v,
            attn_mask,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            dropout=self.attn_drop,
            is_causal=is_causal,
            grid=None if self.token_grid is None else self.token_grid.size(),
        )
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        if gate is not None:
            x = x * gate
        x = self.proj_drop(self.proj(x))
        return x

    @classmethod
    def softmax_core(cls, module: Any) -> Softmax:
        """Return timm's path: SDPA with its default scale, or the query scaled before the product."""
        return Softmax(fused=module.fused_attn, scale_on="query", sdpa_scale=False)

    @classmethod
    def example_inputs(cls, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return tokens (2, 7, C)."""
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(2, 7, module.qkv.in_features, generator=generator),), {}

    @classmethod
    def value_channels(cls, module: Any) -> int:
        """Return heads * head_dim."""
        return int(module.attn_dim)

    @classmethod
    def find_grid(cls, module: Any, ancestors: Sequence[nn.Module]) -> TokenGrid | str | None:
        """Return the grid of the nearest module around it that lays out tokens: a MobileViT block or the model."""
        mobilevit = sys.modules.get("timm.models.mobilevit")
        for ancestor in reversed(ancestors):
            if mobilevit is not None and type(ancestor) is mobilevit.MobileVitBlock:
                return UnfoldGrid.of(ancestor)
            if isinstance(ancestor, VisionTransformer):
                if not isinstance(ancestor.patch_drop, nn.Identity):
                    return "patch_drop removes tokens in training, so V has no grid to be convolved over"
                return PatchGrid.of(ancestor)
        return super().find_grid(module, ancestors)


class PatchGrid(TokenGrid):
    """The grid of a VisionTransformer, written when the image enters its patch embedding, whatever its size."""

    @classmethod
    def of(cls, model: VisionTransformer) -> PatchGrid:
        """Return the model's grid, watching its patch embedding from now on."""
        grid: PatchGrid | None = watching(model.patch_embed, cls)
        if grid is None:
            grid = cls(model.num_prefix_tokens)
            model.patch_embed.register_forward_pre_hook(grid.watch)
        return grid

    def watch(self, patch_embed: Any, args: tuple[Tensor, ...]) -> None:
        """Record the grid of the image about to be embedded."""
        height, width = args[0].shape[-2:]
        self.record(*patch_embed.dynamic_feat_size((height, width)))


class UnfoldGrid(TokenGrid):
    """The grid of a MobileViT block: its tokens are the pixels at one position of every patch."""

    def __init__(self, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size

    @classmethod
    def of(cls, block: Any) -> UnfoldGrid:
        """Return the block's grid, watching its feature map from now on."""
        grid: UnfoldGrid | None = watching(block.conv_1x1, cls)
        if grid is None:
            grid = cls(block.patch_size)
            block.conv_1x1.register_forward_pre_hook(grid.watch)
        return grid

    def watch(self, conv: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Record how many patches the map about to be unfolded has; it is resized up to whole patches."""
        (height, width), (patch_h, patch_w) = args[0].shape[-2:], self.patch_size
        self.record(-(-height // patch_h), -(-width // patch_w))
