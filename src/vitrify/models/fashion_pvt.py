"""`pvt_mini_56`: a small PVTv2 for Fashion-MNIST at 56 px, on which PVT's recipes can be trained on two CPU cores.

The images are 28 px and enlarged twice, as the stem's stride of 4 would leave 49 tokens otherwise. Two stages, as in
the end of a PVT: 14 x 14 = 196 tokens whose keys and values are reduced to 7 x 7, then 7 x 7 = 49 tokens without
reduction, where the paper's ShiftAddViT keeps softmax.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.pvt_v2 import PyramidVisionTransformerV2

from vitrify.models.fashion_vit import FASHION_CFG

default_cfgs = generate_default_cfgs(
    {
        "pvt_mini_56": {
            **FASHION_CFG,
            "input_size": (1, 56, 56),
            "fixed_input_size": False,
            "first_conv": "patch_embed.proj",
        }
    }
)


@register_model  # type: ignore[untyped-decorator]
def pvt_mini_56(pretrained: bool = False, **kwargs: Any) -> PyramidVisionTransformerV2:
    """Build the 0.36 M-parameter PVTv2: stages of 2 blocks, widths 48 and 96, (B, 1, 56, 56) images -> (B, 10) logits.

    Takes every argument of timm's PyramidVisionTransformerV2, and images of any size. No weights come with it.
    """
    architecture: dict[str, Any] = {"in_chans": 1, "num_classes": 10, "depths": (2, 2), "embed_dims": (48, 96)}
    architecture |= {"num_heads": (2, 4), "sr_ratios": (2, 1), "mlp_ratios": (4.0, 4.0)}
    out_indices = kwargs.pop("out_indices", (0, 1))
    return build_model_with_cfg(
        PyramidVisionTransformerV2,
        "pvt_mini_56",
        pretrained,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **(architecture | kwargs),
    )
