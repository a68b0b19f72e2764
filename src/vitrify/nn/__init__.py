"""The primitives as modules: attention cores without parameters, the convolution on the values, and a whole attention.

>>> import torch
>>> from vitrify import nn
>>> attention = nn.Attention(64, num_heads=4, core=nn.Taylor(), value_conv=3)
>>> attention(torch.randn(2, 1 + 6 * 5, 64), grid=(6, 5), num_prefix_tokens=1).shape
torch.Size([2, 31, 64])
"""

from vitrify.nn.attention import Attention, CoreAttention
from vitrify.nn.cores import Core, Softmax, Taylor, TaylorSparse
from vitrify.nn.value_conv import TokenGrid, ValueConv

__all__ = ["Attention", "Core", "CoreAttention", "Softmax", "Taylor", "TaylorSparse", "TokenGrid", "ValueConv"]
