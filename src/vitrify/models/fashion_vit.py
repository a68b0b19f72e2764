"""`vit_mini_patch2_28`: a small ViT for 28 x 28 grey images, whose Fashion-MNIST weights ship with the package.

Patch 2 gives 14 x 14 = 196 tokens, as many patches as ViT-Base has at 224 px, so its attention costs and behaves like
that of the models people convert, while the whole network trains on two CPU cores. The head reads the mean of the
tokens: with so few images, a class token learns more slowly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from vitrify.errors import UnsupportedError

WEIGHTS = Path(__file__).parent / "weights" / "vit_mini_patch2_28.safetensors"


class ConvStem(PatchEmbed):  # type: ignore[misc]  # timm is untyped
    """Patch embedding by three 3 x 3 convolutions, the second with stride 2: (B, C, H, W) -> (B, H/2 * W/2, embed_dim).

    A 2 x 2 patch holds four numbers; overlapping windows let a token see its surroundings, which a shallow ViT needs
    (Xiao et al., "Early Convolutions Help Transformers See Better", 2021).
    Everything else (image size checks, `dynamic_img_size`, output format) is timm's.

    Raises:
        UnsupportedError: for a patch size other than 2, or padding to a multiple of it; the stem is fixed.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = 28,
        patch_size: int = 2,
        in_chans: int = 1,
        embed_dim: int = 64,
        *,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, embed_dim, device=device, dtype=dtype, **kwargs)
        _check_patch_size(self.patch_size)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, padding=1, bias=False, **factory),
            nn.BatchNorm2d(embed_dim // 2, **factory),
            nn.GELU(),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1, bias=False, **factory),
            nn.BatchNorm2d(embed_dim, **factory),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1, **factory),
        )

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the expected image size (pixels, int or (height, width)); the patch size stays 2."""
        if patch_size is not None:
            _check_patch_size(patch_size)
        super().set_input_size(img_size=img_size)


def _check_patch_size(patch_size: int | tuple[int, int]) -> None:
    if patch_size not in (2, (2, 2)):
        raise UnsupportedError(
            f"ConvStem's strides make patches of 2 x 2 pixels; patch_size must be 2, not {patch_size}"
        )


# What timm must know about Fashion-MNIST, whatever the model.
FASHION_CFG: dict[str, Any] = {
    "num_classes": 10,
    "mean": (0.286,),
    "std": (0.353,),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "classifier": "head",
    "label_names": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "license": "apache-2.0",
}

default_cfgs = generate_default_cfgs(
    {
        "vit_mini_patch2_28.fashion_mnist": {
            **FASHION_CFG,
            "file": str(WEIGHTS),
            "input_size": (1, 28, 28),
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj.0",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def vit_mini_patch2_28(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build the 0.26 M-parameter ViT: depth 4, width 64, 2 heads of 32, (B, 1, 28, 28) float images -> (B, 10) logits.

    Takes every argument of timm's VisionTransformer. With `pretrained=True` the packaged Fashion-MNIST weights are
    loaded; position embeddings are resampled for another `img_size`, and the first convolution is adapted to another
    `in_chans`.
    """
    architecture: dict[str, Any] = {"img_size": 28, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    architecture |= {"embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 4, "embed_layer": ConvStem}
    architecture |= {"class_token": False, "global_pool": "avg"}
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        VisionTransformer,
        "vit_mini_patch2_28",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **(architecture | kwargs),
    )
