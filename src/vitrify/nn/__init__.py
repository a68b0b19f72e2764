"""The primitives as modules: attention cores, codes, shift layers, mixtures, the convolution on V, a whole attention.

>>> import torch
>>> from vitrify import nn
>>> attention = nn.Attention(64, num_heads=4, core=nn.Taylor(), value_conv=3)
>>> attention(torch.randn(2, 1 + 6 * 5, 64), grid=(6, 5), num_prefix_tokens=1).shape
torch.Size([2, 31, 64])
"""

from vitrify.nn.attention import Attention, CoreAttention
from vitrify.nn.binarise import LearnedThreshold, TokenMean
from vitrify.nn.cores import Core, Softmax, Taylor, TaylorSparse
from vitrify.nn.hamming import Hamming, calibrate_codes_
from vitrify.nn.integer import IntLinear
from vitrify.nn.kernel_hash import KSH
from vitrify.nn.latency import LatencyRecord, apply_latencies_, measure_latencies_
from vitrify.nn.mixture import Mixture, MixtureLinear, MixtureMlp, mixture_mlp_
from vitrify.nn.shift import ShiftConv2d, ShiftLinear
from vitrify.nn.shift_calibration import calibrate_shift_
from vitrify.nn.value_conv import TokenGrid, ValueConv

__all__ = [
    "KSH",
    "Attention",
    "Core",
    "CoreAttention",
    "Hamming",
    "IntLinear",
    "LatencyRecord",
    "LearnedThreshold",
    "Mixture",
    "MixtureLinear",
    "MixtureMlp",
    "ShiftConv2d",
    "ShiftLinear",
    "Softmax",
    "Taylor",
    "TaylorSparse",
    "TokenGrid",
    "TokenMean",
    "ValueConv",
    "apply_latencies_",
    "calibrate_codes_",
    "calibrate_shift_",
    "measure_latencies_",
    "mixture_mlp_",
]
