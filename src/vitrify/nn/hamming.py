"""The attention core on binary codes (ShiftAddViT): queries and keys are binarised, and both products only add."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrify.errors import InputError, UnsupportedError, unknown
from vitrify.nn.binarise import Binariser, Codes, LearnedThreshold, TokenMean
from vitrify.nn.cores import Core, Dropout
from vitrify.nn.kernel_hash import KSH
from vitrify.nn.modes import evaluating
from vitrify.ops import gpu, hamming_attention
from vitrify.ops.autocast import without_autocast
from vitrify.ops.hamming import Order
from vitrify.ops.hamming.validation import check_mask
from vitrify.ops.taylor.aten import accumulate_dtype
from vitrify.ops.taylor.reference import select
from vitrify.ops.tracing import exporting, fx_leaf

BinariserName = Literal["learned", "token_mean", "ksh"]
Form = Literal["published", "taylor"]

# Shorter rows than this are left short: blown up to length 1 they would be noise, with gradients to match.
SHORTEST = 1e-4


class Hamming(Core):
    """Attention among binary codes C_q, C_k (B, H, N, code_dim) of the queries and keys.

    form "published"  V/2 + 1/pi C_q C_k^T V, then L2-normalised per token and head; V stands at the queries' tokens,
                      so there must be as many queries as keys. `scale` has no place in it.
    form "taylor"     vbar + gain/n C_q C_k^T (V - vbar), first-order Taylor attention with codes for queries and keys
                      (centring V centres the codes C_k too), for any number of queries. `gain` (H, 1, 1) is learned and
                      stands for `scale` as well; head_dim^-0.5 until `calibrate_` sets it.
    order             "linear" C_q (C_k^T V) or "quadratic" (C_q C_k^T) V: the same but for rounding
    binariser         "learned" threshold per head and channel, "token_mean", or "ksh" (16 bits, 25 anchors)
    share             one binariser for queries and keys; their projections stay separate
    bias              "drop" leaves out a bias on the logits (LeViT); otherwise a call with a bias raises
    docs/papers.md 5, 6.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        order: Order = "linear",
        codes: Codes = "binary",
        binariser: BinariserName = "learned",
        *,
        share: bool = False,
        form: Form = "published",
        bias: Literal["carry", "drop"] = "carry",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, valid in (("order", order, get_args(Order)), ("form", form, get_args(Form))):
            if value not in valid:
                raise unknown(name, str(value), valid)
        self.order: Order = order
        self.form: Form = form
        self.bias = bias
        self.query_binariser = _binariser(binariser, num_heads, head_dim, codes, device, dtype)
        self.key_binariser = None if share else _binariser(binariser, num_heads, head_dim, codes, device, dtype)
        self.gain: nn.Parameter | None = None
        self._first_gain = head_dim**-0.5
        if form == "taylor":
            self.gain = nn.Parameter(torch.full((num_heads, 1, 1), self._first_gain, device=device, dtype=dtype))

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
        """Attend; shapes in `nn.cores`.

        Raises UnsupportedError for any mask but key padding, dropout in force, a bias that is not to be dropped, and in
        the published form for numbers of queries and keys that differ.
        """
        if is_causal:
            raise UnsupportedError("is_causal=True: Hamming attention carries key-padding masks only")
        if dropout_p > 0:
            raise UnsupportedError(
                f"attention dropout {dropout_p}: sums have no weights to drop; build the model with 0"
            )
        if bias is not None and self.bias != "drop":
            raise UnsupportedError("a bias on the logits has no code: set bias='drop', or keep this layer's softmax")
        if self._moves_bits(query):
            keys = self.query_binariser if self.key_binariser is None else self.key_binariser
            query_code, key_code = self.query_binariser.packed(query), keys.packed(key)
        else:
            query_code, key_code = self.query_binariser(query), self._of_keys(key)
        bits = self.query_binariser.code_dim, self.query_binariser.codes
        if self.gain is None:
            return published_form(query_code, key_code, value, attn_mask, self.order, *bits)
        return taylor_form(query_code, key_code, value, attn_mask, self.gain, self.order, *bits)

    def _of_keys(self, key: Tensor) -> Tensor:
        code: Tensor = (self.query_binariser if self.key_binariser is None else self.key_binariser)(key)
        return code

    def _moves_bits(self, query: Tensor) -> bool:
        """Say whether codes travel as bits: on a GPU with the kernels, where nobody asks for gradients or a graph."""
        return (
            self.order == "linear"
            and not exporting(query)
            and not torch.is_grad_enabled()
            and gpu.available(query.device)
        )

    def needs_calibration(self) -> bool:
        """Say whether neither `calibrate_` nor training has set anything yet; False where there is nothing to set."""
        if self.gain is not None:
            return bool((self.gain == torch.full_like(self.gain, self._first_gain)).all())
        return all(b.needs_fit() for b in (self.query_binariser, self.key_binariser) if b is not None)

    @torch.no_grad()
    def calibrate_(self, query: Tensor, key: Tensor, *, scale: float) -> Tensor:
        """Fit the binarisers to queries and keys (B, H, N, D), and then the gain; return the fit of each head (H,).

        The gain is the least-squares fit of the codes' centred products to the logits scale q.(k - kbar) that they
        stand for. The fit is the share of those logits' squares that it explains: 1 is perfect, 0 none. It is measured
        in either form, though only "taylor" has the gain.
        """
        self.query_binariser.fit_(query, key, self.key_binariser)
        query_code, key_code = self.query_binariser(query).double(), self._of_keys(key).double()
        query, key = query.double() * scale, key.double()
        key, key_code = (x - x.mean(-2, keepdim=True) for x in (key, key_code))
        # <Q K^T, C_q C_k^T> = <Q^T C_q, K^T C_k>: never n x n.
        both, codes, logits = (
            ((a.mT @ c) * (b.mT @ d)).sum((0, 2, 3))
            for a, b, c, d in (
                (query, key, query_code, key_code),
                (query_code, key_code, query_code, key_code),
                (query, key, query, key),
            )
        )
        usable = (codes > 0) & (logits > 0)
        if self.gain is not None:
            fitted = torch.where(usable, both / codes, self.gain.flatten())
            self.gain.copy_(fitted[:, None, None])
        return torch.where(usable, both.square() / (codes * logits), 0.0)

    def multiplications(
        self, num_queries: int, num_keys: int, key_dim: int, value_dim: int, *, biased: bool = False
    ) -> int:
        """Return the multiplications of one head: none in the linear order but the hashing's own, if there is one.

        The quadratic order multiplies V by integers up to code_dim: n_q n_k d_v. Not in it, as in the other cores'
        counts: one scale per output (gain/n or 1/pi), and the published form's normalisation.
        """
        products = num_queries * num_keys * value_dim if self.order == "quadratic" else 0
        return products + self.query_binariser.multiplications(num_queries + num_keys)

    def additions(self, num_queries: int, num_keys: int, key_dim: int, value_dim: int) -> int:
        """Return the additions of one head, an upper bound for codes 0 and 1, whose zeros add nothing.

        Linear: (n_q + n_k) code_dim d_v. Quadratic: n_q n_k code_dim to count agreeing bits, and n_q n_k d_v. Besides
        those the binariser's, and those of the form: V/2, or the mean of V, its subtraction and its return.
        """
        bits = self.query_binariser.code_dim
        if self.order == "linear":
            products = (num_queries + num_keys) * bits * value_dim
        else:
            products = num_queries * num_keys * (bits + value_dim)
        form = (num_queries + 2 * num_keys if self.form == "taylor" else num_queries) * value_dim
        return products + form + self.query_binariser.additions(num_queries + num_keys)

    def extra_repr(self) -> str:
        """Say which form and order it has."""
        return f"order={self.order!r}, form={self.form!r}, bias={self.bias!r}"


def calibrate_codes_(model: nn.Module, images: Tensor | tuple[Tensor, ...], *, again: bool = True) -> dict[str, float]:
    """Run the model on a few images and calibrate every Hamming core in it, each after those that come before it.

    images: one batch as the model takes it; a few dozen do. Returns {module name: fit}, the mean over heads of what
    `Hamming.calibrate_` returns. The result is part of the state dict. It undoes what training did to thresholds and
    gains: calibrate first, or with again=False only the cores that need it (`Hamming.needs_calibration`).
    Raises InputError if the model has no Hamming core, UnsupportedError if calls are masked.
    """
    cores = {name: module for name, module in model.named_modules() if isinstance(module, Hamming)}
    if not cores:
        raise InputError(f"{type(model).__name__} has no Hamming core to calibrate: convert it first")
    cores = {name: core for name, core in cores.items() if again or core.needs_calibration()}
    if not cores:
        return {}
    fits: dict[str, float] = {}

    def calibrate(core: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(core, Hamming)
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        if mask is not None:
            raise UnsupportedError("calibration takes whole images: give it a batch without padding")
        fits[names[core]] = core.calibrate_(args[0], args[1], scale=kwargs["scale"]).mean().item()

    names = {core: name for name, core in cores.items()}
    hooks = [core.register_forward_pre_hook(calibrate, with_kwargs=True) for core in cores.values()]
    try:
        with torch.no_grad(), evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return fits


@fx_leaf
def published_form(
    query_code: Tensor,
    key_code: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    order: Order,
    code_dim: int | None = None,
    codes: Codes = "binary",
) -> Tensor:
    """Return V/2 + 1/pi C_q C_k^T V, each row of each head scaled to length 1; arguments as in `hamming_attention`."""
    queries, keys = query_code.shape[2], value.shape[2]
    if queries != keys:
        raise UnsupportedError(
            f"{queries} queries and {keys} keys: the published form adds V/2 token by token. Use form='taylor', or "
            "remove the spatial reduction first"
        )
    wide = accumulate_dtype(value.dtype)
    sums = hamming_attention(
        query_code, key_code, value, attn_mask, order=order, out_dtype=wide, code_dim=code_dim, codes=codes
    )
    return F.normalize(value.to(wide) / 2 + sums / math.pi, dim=-1, eps=SHORTEST).to(value.dtype)


@fx_leaf
def taylor_form(
    query_code: Tensor,
    key_code: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    gain: Tensor,
    order: Order,
    code_dim: int | None = None,
    codes: Codes = "binary",
) -> Tensor:
    """Return vbar + gain/n C_q C_k^T (V - vbar), over the n valid keys; arguments as in `hamming_attention`."""
    keep = check_mask(attn_mask, value)
    wide = accumulate_dtype(value.dtype)
    query_code, key_code = (c.to(wide) if c.is_floating_point() else c for c in (query_code, key_code))
    with without_autocast(value):
        _, valid, n = select(keep, value.to(wide), value.to(wide))
        vbar = valid.sum(-2, keepdim=True) / n
        centred = valid - vbar
        sums = hamming_attention(query_code, key_code, centred, attn_mask, order=order, code_dim=code_dim, codes=codes)
        return (vbar + sums * (gain.to(wide) / n)).to(value.dtype)


def _binariser(
    name: BinariserName,
    num_heads: int,
    head_dim: int,
    codes: Codes,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Binariser:
    if name == "learned":
        return LearnedThreshold(num_heads, head_dim, codes, device=device, dtype=dtype)
    if name == "token_mean":
        return TokenMean(head_dim, codes)
    if name == "ksh":
        return KSH(num_heads, head_dim, codes=codes, device=device, dtype=dtype)
    raise unknown("binariser", str(name), get_args(BinariserName))
