"""Binarisers: from queries and keys to codes in Hamming space. Each looks at one token at a time, never at a batch.

forward(x (B, H, N, D)) -> codes (B, H, N, code_dim) in x's dtype: 0 and 1 ("binary"), or -1 and +1 ("sign"). A bit is
set where x > t, t being the threshold; gradients pass straight through where |x - t| <= 1 and stop elsewhere.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from vitrify.errors import InputError, unknown
from vitrify.ops.hamming import threshold_bits
from vitrify.ops.tracing import exporting, fx_leaf

Codes = Literal["binary", "sign"]


@fx_leaf
def binarise(x: Tensor, threshold: Tensor, codes: Codes) -> Tensor:
    """Return the codes of x, in its dtype: 1 where x > threshold, else 0 ("binary") or -1 ("sign"); x = t gives no bit.

    The gradient is that of clamp(x - t, -1, 1), of which "binary" is half plus a half: 1 (or 1/2) where |x - t| <= 1,
    else 0, and the negative for the threshold. An exported or traced graph has no such gradient: it is for inference.
    Raises InputError for thresholds (H, 1, D) of other heads or channels than x (B, H, N, D) has.
    """
    if threshold.dim() == 3 and (threshold.shape[0], threshold.shape[2]) != (x.shape[1], x.shape[3]):
        raise InputError(
            f"x {tuple(x.shape)} does not fit thresholds (heads, 1, channels) {tuple(threshold.shape)}: build the "
            "binariser with the layer's num_heads and head_dim"
        )
    shifted = x - threshold
    bits = (shifted > 0).to(shifted.dtype)
    hard = bits if codes == "binary" else 2 * bits - 1
    if torch.is_grad_enabled() and shifted.requires_grad and not exporting():
        soft = shifted.clamp(-1, 1) * (0.5 if codes == "binary" else 1.0)
        hard = hard + (soft - soft.detach())
    return hard.to(x.dtype)


class Binariser(nn.Module):
    """Base of the binarisers: the call described at the top of this file, and what it costs.

    code_dim  bits per token and head
    """

    def __init__(self, code_dim: int, codes: Codes = "binary") -> None:
        super().__init__()
        if codes not in get_args(Codes):
            raise unknown("codes", str(codes), get_args(Codes))
        self.code_dim = code_dim
        self.codes: Codes = codes

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes; shapes at the top of this file."""
        raise NotImplementedError

    def packed(self, x: Tensor) -> Tensor:
        """Return the codes of x (B, H, N, D) as bits, uint8 (B, H, N, ceil(code_dim / 8)); they carry no gradient."""
        code: Tensor = self(x)
        return threshold_bits(code, code.new_zeros(()))

    def fit_(self, query: Tensor, key: Tensor, key_binariser: Binariser | None = None) -> None:
        """Fit to samples (B, H, N, D) of queries and keys: `self` to both, or only to queries if keys have their own.

        Nothing to fit by default.
        """

    def needs_fit(self) -> bool:
        """Say whether `fit_` is still to come: neither it nor training has set anything."""
        return False

    def multiplications(self, num_tokens: int) -> int:
        """Return the multiplications of one head: comparing costs none."""
        return 0

    def additions(self, num_tokens: int) -> int:
        """Return the additions of one head, each comparison counted as one."""
        return num_tokens * self.code_dim

    def extra_repr(self) -> str:
        """Say which codes it gives."""
        return f"code_dim={self.code_dim}, codes={self.codes!r}"


class LearnedThreshold(Binariser):
    """A threshold per head and channel, parameter `threshold` (num_heads, 1, head_dim), 0 at first."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        codes: Codes = "binary",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(head_dim, codes)
        self.threshold = nn.Parameter(torch.zeros(num_heads, 1, head_dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes of x (B, H, N, D), same shape; raises InputError for other heads or channels."""
        return binarise(x, self.threshold, self.codes)

    def packed(self, x: Tensor) -> Tensor:
        """Return the codes of x as bits, in one pass over x on a GPU."""
        return threshold_bits(x, self.threshold)

    @torch.no_grad()
    def fit_(self, query: Tensor, key: Tensor, key_binariser: Binariser | None = None) -> None:
        """Set the keys' thresholds (a shared one too) to the keys' mean, the queries' to 0.

        Attention does not see a common offset of the keys, so the side of the mean is what tells them apart. It does
        see one of the queries: codes about the queries' mean would lose what all queries look for.
        """
        mean = key.double().mean((0, 2)).unsqueeze(1)
        if isinstance(key_binariser, LearnedThreshold):
            key_binariser.threshold.copy_(mean)
            mean = torch.zeros_like(mean)
        self.threshold.copy_(mean)

    def needs_fit(self) -> bool:
        """Say whether all thresholds are still 0; those of queries stay so when keys have their own."""
        return not bool(self.threshold.any())


class TokenMean(Binariser):
    """The threshold is the token's own mean over its head's channels; no parameters.

    ShiftAddViT's released code takes one mean over the whole batch, so that an image's codes depend on its neighbours.
    """

    def __init__(self, head_dim: int, codes: Codes = "binary") -> None:
        super().__init__(head_dim, codes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes of x (B, H, N, D), same shape."""
        return binarise(x, x.mean(-1, keepdim=True), self.codes)

    def packed(self, x: Tensor) -> Tensor:
        """Return the codes of x as bits, in one pass over x and its means on a GPU."""
        return threshold_bits(x, x.mean(-1, keepdim=True))

    def additions(self, num_tokens: int) -> int:
        """Return the additions of one head: the mean's and the comparisons."""
        return 2 * num_tokens * self.code_dim
