"""PVTv1, the first Pyramid Vision Transformer (Wang et al., ICCV 2021, arXiv 2102.12122), which timm does not have.

Parameters are named as in the released checkpoints (`pvt_tiny.pth`, `pvt_small.pth`), so those load as they are. The
attention is timm's class of PVTv2, which computes the same thing, so whatever vitrify does to it, it does here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.pvt_v2 import Attention
from torch import Tensor, nn

Grid = tuple[int, int]

# The grids of the four stages at 224 px, for which the position embeddings are learned.
NATIVE_GRIDS: tuple[Grid, ...] = ((56, 56), (28, 28), (14, 14), (7, 7))

# Only the norms of the blocks and the last one; those of the patch embeddings and of the reduction keep torch's 1e-5.
_norm = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Non-overlapping patches: (B, C, H, W) -> tokens (B, h * w, embed_dim) and their grid (h, w)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Cut into patches; pixels beyond the last whole patch are left out."""
        x = self.proj(x)
        height, width = x.shape[-2:]
        return self.norm(x.flatten(2).transpose(1, 2)), (height, width)


class Block(nn.Module):
    """Pre-norm transformer block whose keys and values live on a grid reduced `sr_ratio` times per side."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = _norm(dim)
        self.attn = Attention(dim, num_heads=num_heads, sr_ratio=sr_ratio, qkv_bias=True)
        self.norm2 = _norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map tokens (B, N, C) to the same shape; without reduction, N may exceed the grid by a class token."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class PyramidVisionTransformer(nn.Module):
    """Four stages at strides 4, 8, 16 and 32; a class token joins in the last, and the head reads it.

    Images are (B, in_chans, H, W), of 32 px per side or more, logits (B, num_classes). The position embeddings belong
    to 224 px and are interpolated (bilinear, as in the original) for any other size.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False
        total, done = sum(depths), 0
        for i, (depth, dim) in enumerate(zip(depths, embed_dims, strict=True)):
            previous = embed_dims[i - 1] if i else in_chans
            rates = [drop_path_rate * (done + j) / max(1, total - 1) for j in range(depth)]
            done += depth
            blocks = nn.ModuleList(Block(dim, num_heads[i], mlp_ratios[i], sr_ratios[i], rate) for rate in rates)
            positions = NATIVE_GRIDS[i][0] * NATIVE_GRIDS[i][1] + self._prefix_tokens(i)
            setattr(self, f"patch_embed{i + 1}", PatchEmbed(2 if i else 4, previous, dim))
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(torch.zeros(1, positions, dim)))
            setattr(self, f"block{i + 1}", blocks)
        self.norm = _norm(self.num_features)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.num_features))
        self.head = self._make_head(num_classes)
        self._init_weights()

    @staticmethod
    def _prefix_tokens(stage: int) -> int:
        return 1 if stage == len(NATIVE_GRIDS) - 1 else 0

    def _make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def _init_weights(self) -> None:
        # Convolutions and norms keep torch's initial values, as in the original.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in self.no_weight_decay():
            trunc_normal_(getattr(self, name), std=0.02)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def no_weight_decay(self) -> set[str]:
        """Name the class token and the position embeddings (the original's optimiser decays the latter)."""
        return {"cls_token", *(f"pos_embed{i + 1}" for i in range(len(NATIVE_GRIDS)))}

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each block for the backward pass, and compute the rest again."""
        self.grad_checkpointing = enable

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one for `num_classes` (0: none, the output is the class token)."""
        self.num_classes = num_classes
        self.head = self._make_head(num_classes).to(self.cls_token.device, self.cls_token.dtype)

    def _positions(self, stage: int, grid: Grid) -> Tensor:
        positions: Tensor = getattr(self, f"pos_embed{stage + 1}")
        # The original asks whether the grid has as many tokens as that of *stage 1* at 224 px, and so fails at 448 px,
        # where stage 2 has; only the stage's own grid matters.
        if grid == NATIVE_GRIDS[stage]:
            return positions
        prefix_tokens = self._prefix_tokens(stage)
        image = positions[:, prefix_tokens:].transpose(1, 2).reshape(1, -1, *NATIVE_GRIDS[stage])
        image = F.interpolate(image, size=grid, mode="bilinear").flatten(2).transpose(1, 2)
        return torch.cat((positions[:, :prefix_tokens], image), dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised tokens of the last stage, (B, 1 + H/32 * W/32, C), the class token first."""
        for stage in range(len(NATIVE_GRIDS)):
            x, grid = getattr(self, f"patch_embed{stage + 1}")(x)
            is_last = self._prefix_tokens(stage) > 0
            if is_last:
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
            x = x + self._positions(stage, grid)
            for block in getattr(self, f"block{stage + 1}"):
                x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
            if not is_last:
                x = x.transpose(1, 2).reshape(x.shape[0], -1, *grid)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of the class token of tokens (B, N, C), or with `pre_logits` the class token itself."""
        x = x[:, 0]
        out: Tensor = x if pre_logits else self.head(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Classify images (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


_CFG: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "fixed_input_size": False,
    "num_classes": 1000,
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "first_conv": "patch_embed1.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
default_cfgs = generate_default_cfgs({"pvt_v1_tiny": _CFG, "pvt_v1_small": _CFG})


def _create(
    variant: str, pretrained: bool, depths: tuple[int, ...], kwargs: dict[str, Any]
) -> PyramidVisionTransformer:
    arguments = {"depths": depths, **kwargs}
    model: PyramidVisionTransformer = build_model_with_cfg(PyramidVisionTransformer, variant, pretrained, **arguments)
    return model


@register_model  # type: ignore[untyped-decorator]
def pvt_v1_tiny(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """Build PVT-Tiny: 13.2 M parameters; no weights come with it, load the release's `pvt_tiny.pth` (75.1 %)."""
    return _create("pvt_v1_tiny", pretrained, (2, 2, 2, 2), kwargs)


@register_model  # type: ignore[untyped-decorator]
def pvt_v1_small(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformer:
    """Build PVT-Small: 24.5 M parameters; no weights come with it, load the release's `pvt_small.pth` (79.8 %)."""
    return _create("pvt_v1_small", pretrained, (3, 4, 6, 3), kwargs)
