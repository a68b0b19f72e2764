"""What `convert_` makes of GNT's attentions: that of rays takes any core; that of views has no products to replace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.convert import adapters
from vitrify.convert.adapters.base import Adapter
from vitrify.convert.linears import register_mlp
from vitrify.convert.specs import AttentionSpec
from vitrify.nn import Softmax, TokenGrid
from vitrify.nvs.transformer import Mlp, RayAttention, ViewAttention

_NO_PRODUCTS = (
    "subtracts queries from keys and weighs every channel by itself: there is no product of Q and K to replace "
    "(its linear layers are listed by themselves)"
)


class RayAdapter(Adapter, RayAttention):
    """Projections as in RayAttention; the attention itself is the core's. A value_conv runs along the ray."""

    source = RayAttention

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, C) -> (N, P, C); the source's call."""
        attended = self.attend(
            self.heads(self.query(x)),
            self.heads(self.key(x)),
            self.heads(self.value(x)),
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            dropout=self.attn_drop,
            grid=(1, x.shape[1], 0),
        )
        return self.merge(attended)

    def weights(self, x: Tensor) -> Tensor:
        """Return how much each point is attended to, (N, P, C) -> (N, P), as RayAttention.weights, for any core.

        What the core makes of the unit vectors as values: for softmax, Taylor attention and Hamming attention in
        Taylor's form these are its weights; the published Hamming form also scales each of its rows, and the mean is
        over the rows as scaled. Taylor's negative weights count as 0. A value_conv is left out.
        """
        query, key = self.heads(self.query(x)), self.heads(self.key(x))
        units = torch.eye(x.shape[1], dtype=query.dtype, device=x.device).expand(*query.shape[:2], -1, -1)
        weights: Tensor = self.core(query, key, units, scale=self.scale).mean((1, 2)).clamp(min=0)
        return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)

    @classmethod
    def softmax_core(cls, module: Any) -> Softmax:
        """Return the path of RayAttention."""
        return Softmax(fused=module.fused_attn, scale_on="query")

    @classmethod
    def example_inputs(cls, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return tokens (2, 7, C)."""
        generator = torch.Generator().manual_seed(1)
        return (torch.randn(2, 7, module.query.in_features, generator=generator),), {}

    @classmethod
    def value_channels(cls, module: Any) -> int:
        """Return heads * head_dim."""
        return int(module.num_heads * module.head_dim)

    @classmethod
    def conv_kernel(cls, value_conv: int) -> tuple[int, int]:
        """Return a row: the points of a ray are a grid of one row."""
        return 1, value_conv

    @classmethod
    def find_grid(cls, module: Any, ancestors: Sequence[nn.Module]) -> TokenGrid | str | None:
        """Return None: the grid comes with each call."""
        return None

    @classmethod
    def remark(cls, module: Any, spec: AttentionSpec) -> str:
        """Say over what a value_conv convolves."""
        return f"the convolution runs along the ray, {spec.value_conv} points wide" if spec.value_conv else ""


def register() -> None:
    """Make the adapters known to `convert_`; importing `vitrify.nvs` does."""
    adapters.register(RayAdapter)
    adapters.register_without_products(ViewAttention, _NO_PRODUCTS)
    register_mlp(Mlp)
