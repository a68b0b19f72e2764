"""Attention cores: what happens between the q, k, v projections and the output projection. These own no parameters.

Every core is called as

    core(query, key, value, attn_mask, scale=..., dropout_p=..., dropout=..., bias=..., is_causal=...)

    query (B, H, Nq, D), key (B, H, Nk, D), value (B, H, Nk, Dv) -> (B, H, Nq, Dv), in the inputs' dtype
    attn_mask    bool (True = attend) or additive, as in SDPA. Taylor cores take a key-padding mask (B, 1, 1, Nk) only.
    scale        factor of q.k
    dropout_p    probability now in force (0 in eval mode); only the softmax core can drop attention weights
    dropout      the source's own dropout module, which the unfused softmax core calls so that hooks on it still fire
    bias         (H, Nq, Nk) or (B, H, Nq, Nk), added to the logits
so a forward pre-hook (`with_kwargs=True`) on any `*.core` sees the same tensors in a softmax and in a converted model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError
from vitrify.nn.bias import bias_term, biased_sparse
from vitrify.ops import sparse_softmax_attention, taylor_attention, taylor_sparse_attention, taylor_squares_attention
from vitrify.ops.tracing import fx_leaf

Dropout = Callable[[Tensor], Tensor]


class Core(nn.Module):
    """Base of the attention cores: the call described at the top of this file, and what it costs."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; shapes at the top of this file."""
        raise NotImplementedError

    def multiplications(
        self, num_queries: int, num_keys: int, key_dim: int, value_dim: int, *, biased: bool = False
    ) -> int:
        """Return the multiplications of one head at inference: here q k^T and its product with V; a bias costs none."""
        return num_queries * num_keys * (key_dim + value_dim)


class Softmax(Core):
    """Softmax attention, repeating a source implementation's own path so that its result is the same bit for bit.

    fused        call scaled_dot_product_attention; False computes the weights
    scale_on     what `scale` multiplies in the unfused path: the query before the product, or the scores after it
    value_first  the unfused path computes V^T A^T, as LeViT's convolutional form does, instead of A V
    sdpa_scale   hand `scale` to SDPA; False leaves it to SDPA's default, 1/sqrt(D), which can differ in the last bit
    upcast       the unfused path takes the softmax in float32 (Hugging Face)
    A bias always takes the unfused path.
    """

    def __init__(
        self,
        fused: bool = True,
        scale_on: Literal["query", "scores"] = "query",
        *,
        value_first: bool = False,
        sdpa_scale: bool = True,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.scale_on = scale_on
        self.value_first = value_first
        self.sdpa_scale = sdpa_scale
        self.upcast = upcast

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; shapes at the top of this file."""
        if self.fused and bias is None:
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale if self.sdpa_scale else None,
            )
        if self.scale_on == "query":
            scores = (query * scale) @ key.transpose(-2, -1)
        else:
            scores = query @ key.transpose(-2, -1) * scale
        if bias is not None:
            scores = scores + bias
        scores = add_mask(scores, attn_mask, is_causal)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) if self.upcast else scores.softmax(dim=-1)
        if dropout is not None:
            weights = dropout(weights)
        elif dropout_p > 0:
            weights = F.dropout(weights, dropout_p)
        if self.value_first:
            return (value.transpose(-2, -1) @ weights.transpose(-2, -1)).transpose(-2, -1)
        return weights @ value

    def extra_repr(self) -> str:
        """Say which path it takes."""
        return f"fused={self.fused}"


class Taylor(Core):
    """First-order Taylor attention with centred keys, linear in the tokens (ViTALiTy, Algorithm 1; docs/papers.md 2).

    squares  add the squares of the second-order term (QT-ViT); twice the cost, and no bias
    bias     what becomes of a bias on the logits: "carry" adds (b - mean over keys) V / n, the bias's share of the
             expansion exp(qk + b) ~ 1 + qk + b, which costs Nq Nk Dv; "drop" leaves it out
    """

    def __init__(self, squares: bool = False, bias: Literal["carry", "drop"] = "carry") -> None:
        super().__init__()
        self.squares = squares
        self.bias = bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; shapes at the top of this file.

        Raises UnsupportedError for any mask but key padding, for dropout in force, and for a bias beside squares.
        """
        attn_mask = _key_padding(attn_mask, is_causal)
        _check_dropout(dropout_p)
        if bias is None or self.bias == "drop":
            attend = taylor_squares_attention if self.squares else taylor_attention
            return attend(query, key, value, attn_mask, scale=scale)
        if self.squares:
            raise UnsupportedError("a bias on the logits has no place beside the squares term: use squares=False")
        return taylor_attention(query, key, value, attn_mask, scale=scale) + bias_term(bias, value, attn_mask)

    def multiplications(
        self, num_queries: int, num_keys: int, key_dim: int, value_dim: int, *, biased: bool = False
    ) -> int:
        """Return the multiplications of one head: K^T V and Q M, as much again for the squares, and a carried bias."""
        carried = num_queries * num_keys * value_dim if biased and self.bias == "carry" else 0
        return (num_queries + num_keys) * key_dim * value_dim * (2 if self.squares else 1) + carried

    def extra_repr(self) -> str:
        """Say which terms it has."""
        return f"squares={self.squares}, bias={self.bias!r}"


class TaylorSparse(Taylor):
    """Taylor attention plus ViTALiTy's sparse part, which exists in training only: in eval mode it is Taylor exactly.

    threshold  predicted probability from which an entry is corrected to softmax; change it with `set_threshold`
    bits       width of the predictor's queries and keys
    low_rank   False drops the Taylor part, in training *and* eval: softmax over the kept entries (Sanger, a baseline)
    `density` (0-dim float32 buffer) holds the kept share of the last training forward; NaN before the first one.
    With a bias, the predictor sees the logits without it. docs/papers.md 3.
    """

    threshold: Tensor
    density: Tensor

    def __init__(
        self,
        threshold: float,
        bits: int = 4,
        *,
        low_rank: bool = True,
        bias: Literal["carry", "drop"] = "carry",
        device: torch.device | None = None,
    ) -> None:
        super().__init__(bias=bias)
        self.bits = bits
        self.low_rank = low_rank
        self.register_buffer("threshold", torch.zeros((), device=device), persistent=False)
        self.register_buffer("density", torch.full((), float("nan"), device=device), persistent=False)
        self.set_threshold(threshold)

    def set_threshold(self, threshold: float) -> None:
        """Set the threshold: 0 is softmax; above 1, which no probability reaches, it is Taylor without a predictor."""
        if not threshold >= 0:
            raise InputError(f"threshold must be a probability, or above 1 to keep nothing, not {threshold}")
        self._threshold = float(threshold)
        # What forward branches on: compiled code is rebuilt when this changes, not at each new threshold.
        self._keeps_nothing = threshold > 1
        self.threshold.fill_(self._threshold)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float,
        dropout_p: float = 0.0,
        dropout: Dropout | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend; shapes at the top of this file. Raises UnsupportedError as Taylor does."""
        if self.low_rank and (not self.training or self._keeps_nothing):
            if self.training:
                self.density.zero_()
            return super().forward(
                query, key, value, attn_mask, scale=scale, dropout_p=dropout_p, bias=bias, is_causal=is_causal
            )
        attn_mask = _key_padding(attn_mask, is_causal)
        _check_dropout(dropout_p)
        settings: dict[str, Any] = {"scale": scale, "threshold": self.threshold, "bits": self.bits}
        if bias is not None and self.bias == "carry":
            out, density = biased_sparse(query, key, value, attn_mask, bias=bias, low_rank=self.low_rank, **settings)
        else:
            attend = taylor_sparse_attention if self.low_rank else sparse_softmax_attention
            out, density = attend(query, key, value, attn_mask, **settings)
        if self.training:
            # A buffer, not an attribute: so compiled graphs keep it, and a checkpointed block only writes it twice.
            self.density.copy_(density)
        return out

    def multiplications(
        self, num_queries: int, num_keys: int, key_dim: int, value_dim: int, *, biased: bool = False
    ) -> int:
        """Return Taylor's count; without the low-rank part softmax's, an upper bound as density depends on data."""
        if self.low_rank:
            return super().multiplications(num_queries, num_keys, key_dim, value_dim, biased=biased)
        return Core.multiplications(self, num_queries, num_keys, key_dim, value_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep both buffers in float32 when the model is cast: 0.002 has three digits in bfloat16."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.threshold.device
        self.threshold = torch.full((), self._threshold, device=device)
        self.density = self.density.float()
        return self

    def extra_repr(self) -> str:
        """Say what the predictor does."""
        return f"threshold={self._threshold}, bits={self.bits}, low_rank={self.low_rank}, bias={self.bias!r}"


@fx_leaf
def add_mask(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Add a mask as SDPA reads it: causal first, bool (True = attend) as 0 and -inf, float as it is."""
    if is_causal:
        return scores + scores.new_full(scores.shape[-2:], float("-inf")).triu_(1)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores + torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill_(~attn_mask, float("-inf"))
    return scores + attn_mask


@fx_leaf
def _key_padding(attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Return the mask for the op to check; linear attention sums over all keys at once, so it cannot be causal."""
    if is_causal:
        raise UnsupportedError("is_causal=True: Taylor attention carries key-padding masks only")
    return attn_mask


def _check_dropout(dropout_p: float) -> None:
    if dropout_p > 0:
        raise UnsupportedError(
            f"attention dropout {dropout_p}: linear attention has no weights to drop; build the model with 0"
        )
