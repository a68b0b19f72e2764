"""Models that ship with vitrify; importing this package registers them with timm.

>>> import timm, vitrify.models
>>> model = timm.create_model("vit_mini_patch2_28", pretrained=True)
"""

from vitrify.models.fashion_vit import ConvStem, vit_mini_patch2_28

__all__ = ["ConvStem", "vit_mini_patch2_28"]
