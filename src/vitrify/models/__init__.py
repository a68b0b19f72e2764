"""Models that ship with vitrify; importing this package registers them with timm.

>>> import timm, vitrify.models
>>> model = timm.create_model("vit_mini_patch2_28", pretrained=True)
"""

from vitrify.models.fashion_pvt import pvt_mini_56
from vitrify.models.fashion_vit import ConvStem, vit_mini_patch2_28
from vitrify.models.pvt_v1 import pvt_v1_small, pvt_v1_tiny

__all__ = ["ConvStem", "pvt_mini_56", "pvt_v1_small", "pvt_v1_tiny", "vit_mini_patch2_28"]
