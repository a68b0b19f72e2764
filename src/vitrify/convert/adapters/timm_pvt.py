"""timm's PVTv2 attention: queries on the full grid, keys and values on a reduced one (convolution or pooling)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

from vitrify.convert.adapters.base import Adapter
from vitrify.convert.specs import AttentionSpec
from vitrify.nn import Softmax, TokenGrid


class PVTAttention(Adapter, Attention):  # type: ignore[misc]  # timm has no types
    """Projections and spatial reduction as in timm; the attention itself is the core's.

    With `reduction="remove"` keys and values come from every token, as ShiftAddViT's authors first make them, and the
    reduction's convolution and norm stay in the state dict without being used.
    """

    source = Attention

    def forward(self, x: Tensor, feat_size: list[int]) -> Tensor:
        """Attend over x (B, H * W, C) with feat_size (H, W); the source's call."""
        B, N, C = x.shape
        H, W = feat_size
        q = self.q(x).reshape(B, N, self.num_heads, -1).permute(0, 2, 1, 3)
        if self.attention_spec.reduction == "remove":
            pass
        elif self.pool is not None:
            x = self.pool(x.permute(0, 2, 1).reshape(B, C, H, W))
            x = self.act(self.norm(self.sr(x).reshape(B, C, -1).permute(0, 2, 1)))
        elif self.sr is not None:
            x = self.sr(x.permute(0, 2, 1).reshape(B, C, H, W)).reshape(B, C, -1).permute(0, 2, 1)
            x = self.norm(x)
        k, v = self.kv(x).reshape(B, -1, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(
            q,
            k,
            v,
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            dropout=self.attn_drop,
            grid=(H, W, N - H * W),  # PVTv1 has a class token in its last stage
        )
        x = self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))
        return x

    @classmethod
    def softmax_core(cls, module: Any) -> Softmax:
        """Return timm's path: SDPA with its default scale, or the query scaled before the product."""
        return Softmax(fused=module.fused_attn, scale_on="query", sdpa_scale=False)

    @classmethod
    def example_inputs(cls, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return tokens (2, H * W, C) of a grid that the reduction divides, and that grid."""
        step = 1 if module.sr is None else module.sr.stride[0]
        height, width = 2 * step, 3 * step
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(2, height * width, module.dim, generator=generator), [height, width]), {}

    @classmethod
    def value_channels(cls, module: Any) -> int:
        """Return the width of the stage."""
        return int(module.dim)

    @classmethod
    def refusal(cls, module: Any, spec: AttentionSpec) -> str | None:
        """Refuse what adds V itself to the output where keys and values live on another grid than the queries."""
        published = spec.core == "hamming" and spec.form == "published"
        if module.sr is not None and spec.reduction == "keep" and (spec.value_conv or published):
            part = "value_conv" if spec.value_conv else "the published form's V/2"
            return (
                f"{part}: V lives on a reduced grid, not the queries', so their sum is undefined; set "
                "attention.reduction to 'remove', or do without it (value_conv: 0, and form: taylor for codes)"
            )
        return super().refusal(module, spec)

    @classmethod
    def remark(cls, module: Any, spec: AttentionSpec) -> str:
        """Say that the reduction is gone where there was one."""
        return "spatial reduction removed" if module.sr is not None and spec.reduction == "remove" else ""

    @classmethod
    def idles(cls, module: Any) -> bool:
        """Return whether the reduction is there without being used."""
        return module.sr is not None and module.attention_spec.reduction == "remove"

    @classmethod
    def find_grid(cls, module: Any, ancestors: Sequence[nn.Module]) -> TokenGrid | str | None:
        """Return None, as the grid comes with each call."""
        return None
