"""timm's LeViT attentions, linear and convolutional: values wider than keys, a bias per relative position.

The bias b is fixed once trained. In the Taylor expansion exp(qk + b) ~ 1 + qk + b it becomes a fixed mixing of the
tokens, (b - mean over keys of b) V / n: see `nn.bias`. It costs Nq Nk Dv per head; `AttentionSpec.bias = "drop"` leaves
it out, and the parameter `attention_biases` then stays in the state dict without being used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models.levit import Attention, AttentionDownsample
from torch import Tensor, nn

from vitrify.convert.adapters.base import Adapter
from vitrify.convert.specs import AttentionSpec
from vitrify.nn import Softmax, Taylor, TokenGrid


class LeViTAdapter(Adapter):
    """What the two attentions share. Their caches of gathered biases, and `train()` returning None, are timm's."""

    num_heads: int
    scale: float
    get_attention_biases: Callable[[torch.device], Tensor]

    def attend_biased(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attend over (B, H, N, D) with the bias of this layer; grid: height and width of the keys' tokens."""
        dropped = isinstance(self.core, Taylor) and self.core.bias == "drop"
        bias = None if dropped else self.get_attention_biases(query.device)
        return self.attend(query, key, value, scale=self.scale, bias=bias, grid=(*grid, 0))

    @classmethod
    def softmax_core(cls, module: Any) -> Softmax:
        """Return timm's path: unfused, scores scaled, then biased; V^T A^T in the convolutional layout."""
        return Softmax(fused=False, scale_on="scores", value_first=module.use_conv)

    @classmethod
    def example_inputs(cls, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return tokens (2, H * W, C), or a map (2, C, H, W), at the one resolution that the bias fits."""
        projection = module.kv if hasattr(module, "kv") else module.qkv
        height, width = module.resolution
        generator = torch.Generator().manual_seed(1)
        if module.use_conv:
            return (torch.randn(2, projection.linear.in_channels, height, width, generator=generator),), {}
        return (torch.randn(2, height * width, projection.linear.in_features, generator=generator),), {}

    @classmethod
    def value_channels(cls, module: Any) -> int:
        """Return heads * value width."""
        return int(module.val_attn_dim)

    @classmethod
    def query_heads(cls, module: Any) -> tuple[int, int]:
        """Return (heads, width of a key): values are wider."""
        return int(module.num_heads), int(module.key_dim)

    @classmethod
    def dropout_p(cls, module: Any) -> float:
        """Return 0: LeViT has no attention dropout."""
        return 0.0

    @classmethod
    def refusal(cls, module: Any, spec: AttentionSpec) -> str | None:
        """Refuse the squares term, and codes, beside a bias, which is first-order; and V/2 where queries are fewer."""
        if spec.core == "hamming" and spec.bias == "carry":
            return "codes have no rule for this module's position bias: set attention.bias to 'drop'"
        if spec.core == "hamming" and spec.form == "published" and isinstance(module, AttentionDownsample):
            return "the published form's V/2 has more tokens than the queries here: set attention.form to 'taylor'"
        if spec.squares and spec.bias == "carry":
            return "attention.squares has no rule for this module's position bias: set attention.bias to 'drop'"
        return super().refusal(module, spec)

    @classmethod
    def remark(cls, module: Any, spec: AttentionSpec) -> str:
        """Say what became of the bias, and at what cost."""
        if spec.core == "softmax":
            return ""
        if spec.bias == "drop":
            return "position bias dropped"
        if spec.core == "sparse":
            return ""  # it adds the bias to its logits, as softmax does
        queries, keys = module.attention_bias_idxs.shape
        cost = queries * keys * module.val_dim
        return f"position bias carried as a token-mixing term of V, n_q n_k d_v = {cost:,} multiplications per head"

    @classmethod
    def idles(cls, module: Any) -> bool:
        """Return whether the bias is there without being used."""
        spec: AttentionSpec = module.attention_spec
        return spec.core != "softmax" and spec.bias == "drop"

    @classmethod
    def find_grid(cls, module: Any, ancestors: Sequence[nn.Module]) -> TokenGrid | str | None:
        """Return None: the bias fixes the resolution, so the grid comes with each call."""
        return None


class LeViTAttention(LeViTAdapter, Attention):  # type: ignore[misc]  # timm has no types
    """Projections as in timm; the attention itself is the core's."""

    source = Attention

    def forward(self, x: Tensor) -> Tensor:
        """Attend over x, (B, N, C) or (B, C, H, W) with `use_conv`; the source's call."""
        widths = [self.key_dim, self.key_dim, self.val_dim]
        if self.use_conv:
            B, _, H, W = x.shape
            q, k, v = (t.mT for t in self.qkv(x).view(B, self.num_heads, -1, H * W).split(widths, dim=2))
            x = self.attend_biased(q, k, v, (H, W)).mT.reshape(B, -1, H, W)
        else:
            B, N, _ = x.shape
            q, k, v = (t.transpose(1, 2) for t in self.qkv(x).view(B, N, self.num_heads, -1).split(widths, dim=3))
            x = self.attend_biased(q, k, v, self.resolution).transpose(1, 2).reshape(B, N, self.val_attn_dim)
        x = self.proj(x)
        return x


class LeViTAttentionDownsample(LeViTAdapter, AttentionDownsample):  # type: ignore[misc]  # timm has no types
    """Queries on every `stride`-th row and column of the keys' grid; projections as in timm, attention by the core."""

    source = AttentionDownsample

    def forward(self, x: Tensor) -> Tensor:
        """Attend over x, (B, N, C) or (B, C, H, W) with `use_conv`; the source's call."""
        widths = [self.key_dim, self.val_dim]
        if self.use_conv:
            B, _, H, W = x.shape
            HH, WW = (H - 1) // self.stride + 1, (W - 1) // self.stride + 1
            k, v = (t.mT for t in self.kv(x).view(B, self.num_heads, -1, H * W).split(widths, dim=2))
            q = self.q(x).view(B, self.num_heads, self.key_dim, -1).mT
            x = self.attend_biased(q, k, v, (H, W)).mT.reshape(B, self.val_attn_dim, HH, WW)
        else:
            B, N, _ = x.shape
            k, v = (t.transpose(1, 2) for t in self.kv(x).view(B, N, self.num_heads, -1).split(widths, dim=3))
            q = self.q(x).view(B, -1, self.num_heads, self.key_dim).transpose(1, 2)
            x = self.attend_biased(q, k, v, self.resolution).transpose(1, 2).reshape(B, -1, self.val_attn_dim)
        x = self.proj(x)
        return x

    def convolve(
        self, value: Tensor, grid: tuple[int, int, int], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Convolve V on the keys' grid, and read it where the queries are: at every `stride`-th row and column."""
        out = super().convolve(value, grid, attn_mask, is_causal)
        out = out.reshape(*out.shape[:2], grid[0], grid[1], -1)
        return out[:, :, :: self.stride, :: self.stride].flatten(2, 3)
