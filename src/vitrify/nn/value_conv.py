"""The depth-wise convolution on the values, which gives linear attention a sense of place, and the grid it needs.

After FLatten (ICCV 2023), where it is worth 2.3 points to DeiT-Tiny with linear attention; docs/papers.md 4.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.ops.tracing import fx_leaf


class TokenGrid:
    """The height and width, in tokens, of the image in flight, and how many prefix tokens come before it.

    One object is shared by a model's attention modules; a forward pre-hook where the grid is made (a bound method, so
    that deepcopy copies it along) writes it, and the attention of the same forward pass reads it.

    >>> grid = TokenGrid(num_prefix_tokens=1)
    >>> grid.record(14, 7)
    >>> grid.size()
    (14, 7, 1)
    """

    def __init__(self, num_prefix_tokens: int = 0) -> None:
        self.height: int | None = None
        self.width: int | None = None
        self.num_prefix_tokens = num_prefix_tokens

    def record(self, height: int, width: int) -> None:
        """Note the grid of the image in flight."""
        self.height = height
        self.width = width

    def size(self) -> tuple[int, int, int]:
        """Return (height, width, num_prefix_tokens); raise InputError if no image has passed yet."""
        if self.height is None or self.width is None:
            raise InputError("the token grid is unknown: attention was called before the layer that makes the tokens")
        return self.height, self.width, self.num_prefix_tokens


class ValueConv(nn.Module):
    """Depth-wise 2-D convolution of the values over the token grid: adds to an attention's output, starts at zero.

    channels     heads * value width; each is convolved alone
    kernel_size  odd, or (height, width), both odd; the grid is padded with zeros
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if min(height, width) < 1 or height * width % 2 == 0:
            raise InputError(f"kernel_size must be odd and positive, not {kernel_size}")
        self.conv = nn.Conv2d(
            channels,
            channels,
            (height, width),
            padding=(height // 2, width // 2),
            groups=channels,
            bias=False,
            device=device,
            dtype=dtype,
        )
        nn.init.zeros_(self.conv.weight)

    @staticmethod
    def multiplications(kernel_size: tuple[int, ...], num_tokens: int, value_dim: int) -> int:
        """Return the multiplications of one head, height * width * n d_v; prefix tokens are counted too.

        kernel_size: (height, width).
        """
        return math.prod(kernel_size) * num_tokens * value_dim

    def forward(
        self,
        value: Tensor,
        height: int,
        width: int,
        num_prefix_tokens: int = 0,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Convolve value (B, H, prefix + height * width, Dv) -> the same shape; prefix tokens get 0.

        attn_mask: bool key-padding mask (B, 1, 1, N), True = valid; padded tokens count as zeros.
        Raises InputError if the grid does not fit the tokens, UnsupportedError for other masks.
        """
        value = _valid_tokens(value, height, width, num_prefix_tokens, attn_mask, is_causal)
        batch, heads, _, value_dim = value.shape
        image = value[:, :, num_prefix_tokens:].transpose(2, 3).reshape(batch, heads * value_dim, height, width)
        out: Tensor = self.conv(image).reshape(batch, heads, value_dim, height * width).transpose(2, 3)
        return F.pad(out, (0, 0, num_prefix_tokens, 0)) if num_prefix_tokens else out


@fx_leaf
def _valid_tokens(
    value: Tensor, height: int, width: int, num_prefix_tokens: int, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    tokens = value.shape[2]
    if num_prefix_tokens + height * width != tokens:
        raise InputError(
            f"{tokens} tokens do not fill a grid of {height} x {width} after {num_prefix_tokens} prefix tokens"
        )
    if is_causal:
        raise UnsupportedError("is_causal=True: the convolution on V would look ahead")
    if attn_mask is None:
        return value
    if attn_mask.dtype != torch.bool or attn_mask.dim() != 4 or attn_mask.shape[1:3] != (1, 1):
        raise UnsupportedError(
            f"attn_mask {attn_mask.dtype} of shape {tuple(attn_mask.shape)}: the convolution on V takes a bool "
            f"key-padding mask (batch, 1, 1, {tokens}) only"
        )
    return value.masked_fill(~attn_mask.transpose(2, 3), 0)
