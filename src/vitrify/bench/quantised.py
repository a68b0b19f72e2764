"""What one would run instead of a shift layer: torch's products of INT8, FP8 and 4-bit integer weights, and torchao's.

Torch's quantise the input as it comes, token by token, and are written as briefly as a user would.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]
GROUP = 64


@dataclass(frozen=True)
class Rival:
    """One linear layer: `make(weight, bias)` returns it, and the float64 weight (out, in) that it stands for.

    rounding: how it rounds its input ("float", "int8", "float8"), and so what it multiplies in; bits: of a weight.
    `objection` says why it cannot run on such rows, inputs, outputs, dtypes and devices, or None.
    """

    name: str
    rounding: str
    bits: float
    make: Callable[[Tensor, Tensor], tuple[Linear, Tensor]]
    objection: Callable[[int, int, int, torch.dtype, torch.device], str | None]


def int8(weight: Tensor, bias: Tensor) -> tuple[Linear, Tensor]:
    """Symmetric INT8 weights, a scale per channel, through torch._int_mm."""
    step = weight.abs().amax(1) / 127
    values = (weight / step[:, None]).round().to(torch.int8)
    transposed = values.t()

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True) / 127
        sums = torch._int_mm((wide / scale).round().to(torch.int8), transposed)
        return (sums * scale * step + bias).to(x.dtype)

    return run, values.double() * step[:, None].double()


def float8(weight: Tensor, bias: Tensor) -> tuple[Linear, Tensor]:
    """E4M3 weights, a scale per channel, through torch._scaled_mm."""
    step = weight.abs().amax(1) / 448
    values = (weight / step[:, None]).to(torch.float8_e4m3fn)
    transposed, row = values.t(), step[None]

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True) / 448
        rounded = (wide / scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(rounded, transposed, scale_a=scale, scale_b=row, bias=bias, out_dtype=x.dtype)

    return run, values.double() * step[:, None].double()


def int4(weight: Tensor, bias: Tensor) -> tuple[Linear, Tensor]:
    """4-bit integer weights, a scale per group of 64, the input in bfloat16 (tinygemm)."""
    grouped = weight.view(len(weight), -1, GROUP)
    step = (grouped.abs().amax(-1) / 7).bfloat16()
    levels = (grouped / step[..., None].float()).round().clamp(-8, 7)
    exact = (levels.double() * step[..., None].double()).flatten(1)
    unsigned = (levels.flatten(1) + 8).int()
    scales = torch.stack([step, torch.zeros_like(step)], -1).transpose(0, 1).contiguous()
    if weight.device.type == "cuda":
        packed = torch._convert_weight_to_int4pack((unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8), 8)
        return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, scales) + bias, exact
    packed = torch._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales) + bias, exact


def torchao_int4(weight: Tensor, bias: Tensor) -> tuple[Linear, Tensor]:
    """4-bit integer weights with zero points, a scale per group of 64, as torchao packs them for tinygemm."""
    configs: Any = importlib.import_module("torchao.quantization")
    return _torchao(weight, bias, configs.Int4WeightOnlyConfig(GROUP, int4_packing_format="tile_packed_to_4d"))


def torchao_float8(weight: Tensor, bias: Tensor) -> tuple[Linear, Tensor]:
    """E4M3 weights and inputs, a scale per channel and per token, as torchao rounds them."""
    configs: Any = importlib.import_module("torchao.quantization")
    config = configs.Float8DynamicActivationFloat8WeightConfig(granularity=configs.PerRow())
    return _torchao(weight, bias, config)


def _torchao(weight: Tensor, bias: Tensor, config: object) -> tuple[Linear, Tensor]:
    quantize_: Any = importlib.import_module("torchao.quantization").quantize_
    out, width = weight.shape
    layer = nn.Sequential(nn.Linear(width, out, device=weight.device, dtype=bias.dtype)).requires_grad_(False)
    linear = cast("nn.Linear", layer[0])
    linear.weight.copy_(weight)
    linear.bias.copy_(torch.zeros_like(bias))
    quantize_(layer, config)
    # What the layer makes of unit vectors is its weight, whatever class holds it; a bias would only round it.
    decoded = layer(torch.eye(width, device=weight.device, dtype=bias.dtype)).mT.double()
    linear.bias.copy_(bias)
    return layer, decoded


def _no_int8(rows: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type == "cuda" and (rows <= 16 or width % 8 or out % 8):
        return "torch._int_mm wants more than 16 rows and widths that are multiples of 8"
    return None


def _no_float8(rows: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "needs a GPU of compute capability 9.0"
    if dtype != torch.bfloat16 or width % 16 or out % 16:
        return "torch._scaled_mm by rows wants bfloat16 and widths that are multiples of 16"
    return None


def _no_int4(rows: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if dtype != torch.bfloat16:
        return "4-bit integer weights take bfloat16"
    return None if width % GROUP == 0 and out % 16 == 0 else f"wants inputs in groups of {GROUP}, outputs in 16s"


def _no_torchao_int4(rows: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> str | None:
    on_gpu = None if device.type == "cuda" else "torchao packs these for GPUs"
    return _no_torchao() or on_gpu or _no_int4(rows, width, out, dtype, device)


def _no_torchao_float8(rows: int, width: int, out: int, dtype: torch.dtype, device: torch.device) -> str | None:
    return _no_torchao() or _no_float8(rows, width, out, dtype, device)


def _no_torchao() -> str | None:
    return "torchao is not installed" if importlib.util.find_spec("torchao") is None else None


RIVALS = (
    Rival("torch INT8", "int8", 8, int8, _no_int8),
    Rival("torch FP8", "float8", 8, float8, _no_float8),
    Rival("torch INT4 weights", "float", 4 + 32 / GROUP, int4, _no_int4),
    Rival("torchao INT4 weights", "float", 4 + 32 / GROUP, torchao_int4, _no_torchao_int4),
    Rival("torchao FP8", "float8", 8, torchao_float8, _no_torchao_float8),
)
