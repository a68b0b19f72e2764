"""GNT's two transformers: one attends over the source views of a point, the other over the points of a ray.

Varma T. et al., "Is Attention All That NeRF Needs?", ICLR 2023, sections 3.2 and 3.3. Norm first, residual, ReLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError


class Mlp(nn.Module):
    """Two linear layers with a ReLU between them; treats each token alone."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        out: Tensor = self.drop(self.fc2(self.drop(F.relu(self.fc1(x)))))
        return out


class Encoding(nn.Module):
    """x, sin(2^i x) and cos(2^i x) for i = 0 ... frequencies - 1: (..., C) -> (..., C (1 + 2 frequencies))."""

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.factors = [2.0**i for i in range(frequencies)]

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        waves = [wave(x * factor) for factor in self.factors for wave in (torch.sin, torch.cos)]
        return torch.cat([x, *waves], -1)


class ViewAttention(nn.Module):
    """Subtraction attention of a point over its source views: a weight for each view *and channel*.

        weights = softmax over views of score(K - Q + P),   out = sum over views of weights * (V + P)

    with P = position(angle between the rays), K = key(view), V = value(K), Q = query(point). No product of Q and K.

    squeeze  hidden channels of the position and score MLPs
    """

    def __init__(self, width: int, squeeze: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.position = Mlp(4, squeeze, width)
        self.score = Mlp(width, squeeze, width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, views: Tensor, angles: Tensor, valid: Tensor) -> Tensor:
        """x (N, P, C), views (N, P, V, C), angles (N, P, V, 4), valid (N, P, V) bool -> (N, P, C).

        A point without a valid view weighs all alike: their features are zeros, and what is out of sight is finite.
        """
        keys = self.key(views)
        values = self.value(keys)
        position = self.position(angles)
        # The negative of the smaller tensor: its gradient, too, is negated after it was summed over the views.
        scores = self.score(keys + (-self.query(x))[:, :, None] + position)
        # Not -inf, which a point without valid views would turn into NaN; half the least, so that sums stay finite.
        unseen = scores.new_zeros(valid.shape).masked_fill(~valid, torch.finfo(scores.dtype).min / 2)
        weights = self.drop((scores + unseen[..., None]).softmax(-2))
        out: Tensor = self.drop(self.out(((values + position) * weights).sum(-2)))
        return out


class ViewTransformer(nn.Module):
    """View attention and an MLP."""

    def __init__(self, width: int, squeeze: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = ViewAttention(width, squeeze, dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, width, dropout)

    def forward(self, x: Tensor, views: Tensor, angles: Tensor, valid: Tensor) -> Tensor:
        """See ViewAttention."""
        x = x + self.attn(self.attn_norm(x), views, angles, valid)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class RayAttention(nn.Module):
    """Multi-head dot-product self-attention over the points of a ray; projections without bias, the output's with.

    Raises InputError if num_heads does not divide the width.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise InputError(f"width {width} must be a multiple of num_heads {num_heads}")
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.attn_drop = nn.Dropout(dropout)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, C) -> (N, P, C)."""
        query, key, value = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        if self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout_p, scale=self.scale)
        else:
            scores = (query * self.scale) @ key.transpose(-2, -1)
            attended = self.attn_drop(scores.softmax(-1)) @ value
        return self.merge(attended)

    def heads(self, x: Tensor) -> Tensor:
        """(N, P, C) -> (N, heads, P, head_dim)."""
        return x.reshape(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def merge(self, attended: Tensor) -> Tensor:
        """(N, heads, P, head_dim) -> (N, P, C), projected."""
        out: Tensor = self.drop(self.out(attended.transpose(1, 2).flatten(2)))
        return out

    def weights(self, x: Tensor) -> Tensor:
        """Return how much each point of a ray is attended to: (N, P, C) -> (N, P), summing to 1.

        The mean over heads and over the points that ask, since a ray's colour is the mean of its points. (The released
        code takes the first point alone, which need not stand for the others once the attention is converted.)
        """
        query, key = self.heads(self.query(x)), self.heads(self.key(x))
        weights: Tensor = ((query * self.scale) @ key.transpose(-2, -1)).softmax(-1)
        return weights.mean((1, 2))


class RayTransformer(nn.Module):
    """Ray attention and an MLP; before them, in every other block, an MLP that adds place and direction.

    encoded  channels of the encoded point and direction, 0 in a block without that MLP
    """

    def __init__(self, width: int, num_heads: int, encoded: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.place = Mlp(width + encoded, width, width) if encoded else None
        self.attn_norm = nn.LayerNorm(width, eps=1e-6)
        self.attn = RayAttention(width, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, width, dropout)

    def locate(self, x: Tensor, encoding: Tensor) -> Tensor:
        """Join x (N, P, C) with the encoding (N, P, encoded) of where its points are."""
        return x if self.place is None else self.place(torch.cat([x, encoding], -1))

    def forward(self, x: Tensor, encoding: Tensor) -> Tensor:
        """(N, P, C) -> (N, P, C)."""
        x = self.locate(x, encoding)
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out
