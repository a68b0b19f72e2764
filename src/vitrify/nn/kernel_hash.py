"""Kernelised supervised hashing (KSH), EcoFormer's binariser: codes fitted so that similar tokens share bits.

    k(x)_a = exp(-|x - anchor_a|^2 / (2 width)) - mean_a,     bit_r = 1 if sum_a k(x)_a weight_ar > 0

The fit (Liu et al., CVPR 2012; EcoFormer, NeurIPS 2022): S_ij is +1 for the 10 keys most similar to query i, -1 for the
10 least similar, else 0. Bits are fitted one after another; each maximises y_q^T R y_k for its vectors of signs, where
R starts as bits * S, and the outer product of what a bit got is taken from R before the next one (greedy residual).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitrify.errors import InputError, VitrifyError
from vitrify.nn.binarise import Binariser, Codes, binarise
from vitrify.ops.taylor.aten import accumulate_dtype
from vitrify.ops.taylor.registration import without_autocast
from vitrify.ops.tracing import fx_leaf

PAIRS = 10  # most and least similar keys of each query: the labels
STEPS = 100  # gradient steps per bit
STEP_SIZE = 0.02  # Adam's, for weights scaled to give projections of unit variance
TOKENS = 256  # per image, drawn for the fit: the labels of n tokens are an n x n matrix
SEED = 0  # of the draw of anchors and tokens


class KSH(Binariser):
    """Kernelised hashing with `anchors` anchors per head and `bits` bits; call `fit_` (or load a state dict) first.

    Buffers: anchors (H, A, D), width (H, 1, 1), mean (H, 1, A), weight (H, A, bits). They are fixed after the fit;
    gradients pass through the kernel to x. The kernel is computed in float32 at least.
    """

    anchors: Tensor
    width: Tensor
    mean: Tensor
    weight: Tensor

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        bits: int = 16,
        anchors: int = 25,
        codes: Codes = "binary",
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(bits, codes)
        if bits < 1 or anchors < 2:
            raise InputError(f"hashing needs 1 bit and 2 anchors at least, not bits={bits} and anchors={anchors}")
        sizes = {"anchors": (anchors, head_dim), "width": (1, 1), "mean": (1, anchors), "weight": (anchors, bits)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(num_heads, *size, device=device, dtype=dtype))
        # A plain bool: reading it off a buffer in every forward would wait for the device, and break compiled graphs.
        self.fitted = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes (B, H, N, bits) of x (B, H, N, D); raises VitrifyError before the fit."""
        if not self.fitted:
            raise VitrifyError("hashing is not fitted: call calibrate_codes_(model, images), or load fitted weights")
        projected = _project(x, self.anchors, self.width, self.mean, self.weight)
        return binarise(projected, projected.new_zeros(()), self.codes)

    @torch.no_grad()
    def fit_(self, query: Tensor, key: Tensor, key_binariser: Binariser | None = None) -> None:
        """Fit to samples (B, H, Nq, D), (B, H, Nk, D): one hash for both, or with `key_binariser` another KSH for keys.

        Similar pairs are sought within an image. Deterministic: the same samples give the same hash.
        Raises InputError for fewer than two keys per image, too few tokens for the anchors, or samples not finite.
        """
        if key_binariser is not None and not isinstance(key_binariser, KSH):
            raise InputError(f"queries and keys must be hashed alike, not by KSH and {type(key_binariser).__name__}")
        if not (query.isfinite().all() and key.isfinite().all()):
            raise InputError("the samples to fit hashing to hold NaN or infinities")
        generator = torch.Generator().manual_seed(SEED)
        query, key = _draw(query.float(), generator), _draw(key.float(), generator)
        similar = _labels(query, key)
        if key_binariser is None:
            self._place_anchors(torch.cat((query, key), 2), generator)
            weight = _fit_bits(self._kernel(query), self._kernel(key), similar, self.code_dim)
            self.weight.copy_(weight)
        else:
            self._place_anchors(query, generator)
            key_binariser._place_anchors(key, generator)
            # One long weight vector for both: queries see its first part, keys its second.
            of_query, of_key = self._kernel(query), key_binariser._kernel(key)
            padded_query = torch.cat((of_query, of_query.new_zeros(*of_query.shape[:3], of_key.shape[3])), 3)
            padded_key = torch.cat((of_key.new_zeros(*of_key.shape[:3], of_query.shape[3]), of_key), 3)
            weight = _fit_bits(padded_query, padded_key, similar, self.code_dim)
            self.weight.copy_(weight[:, : of_query.shape[3]])
            key_binariser.weight.copy_(weight[:, of_query.shape[3] :])
            key_binariser.fitted = True
        self.fitted = True

    def multiplications(self, num_tokens: int) -> int:
        """Return the multiplications of one head: A D for the distances and A bits for the projections, per token.

        Not in it: A exponentials per token. 1/(2 width) scales x and the anchors, so the projection before can hold it.
        """
        _, anchors, dim = self.anchors.shape
        return num_tokens * anchors * (dim + self.code_dim)

    def additions(self, num_tokens: int) -> int:
        """Return the additions of one head: differences and their sums, centring, projections and comparisons."""
        _, anchors, dim = self.anchors.shape
        return num_tokens * (anchors * (2 * dim + 1 + self.code_dim) + self.code_dim)

    def _place_anchors(self, samples: Tensor, generator: torch.Generator) -> None:
        """Take anchors from the samples (B, H, N, D) of each head, and measure the kernel's width and mean on all."""
        tokens = samples.transpose(0, 1).flatten(1, 2)
        wanted = self.anchors.shape[1]
        if tokens.shape[1] < wanted:
            raise InputError(f"{tokens.shape[1]} sampled tokens cannot give {wanted} anchors: calibrate on more images")
        chosen = torch.randperm(tokens.shape[1], generator=generator)[:wanted].to(tokens.device)
        self.anchors.copy_(tokens[:, chosen])
        distances = _square_distances(samples, self.anchors.float())
        # Identical samples have width 0; the kernel is then the same number for all of them, whatever it is divided by.
        self.width.copy_(distances.mean((0, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny)[:, None, None])
        self.mean.copy_(torch.exp(-distances / (2 * self.width.float())).mean((0, 2)).unsqueeze(1))

    def _kernel(self, x: Tensor) -> Tensor:
        return _kernel(x, self.anchors, self.width, self.mean)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fitted = not self.width.is_meta and bool((self.width > 0).all())


def _square_distances(x: Tensor, anchors: Tensor) -> Tensor:
    """Return |x - anchor|^2, (B, H, N, A); a common offset is taken out first, so that it costs no digits."""
    offset = anchors.mean(-2, keepdim=True)
    x, anchors = x - offset, anchors - offset
    squares = x.square().sum(-1, keepdim=True) + anchors.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * x @ anchors.mT).clamp(min=0)


def _kernel(x: Tensor, anchors: Tensor, width: Tensor, mean: Tensor) -> Tensor:
    dtype = accumulate_dtype(x.dtype)
    distances = _square_distances(x.to(dtype), anchors.to(dtype))
    return torch.exp(-distances / (2 * width.to(dtype))) - mean.to(dtype)


@fx_leaf
def _project(x: Tensor, anchors: Tensor, width: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """Return the projections (B, H, N, bits) whose signs are the bits, in x's dtype."""
    with without_autocast(x):
        return (_kernel(x, anchors, width, mean) @ weight.to(accumulate_dtype(x.dtype))).to(x.dtype)


def _draw(samples: Tensor, generator: torch.Generator) -> Tensor:
    tokens = samples.shape[2]
    if tokens <= TOKENS:
        return samples
    return samples[:, :, torch.randperm(tokens, generator=generator)[:TOKENS].to(samples.device)]


def _labels(query: Tensor, key: Tensor) -> Tensor:
    """Return S (B, H, Nq, Nk): +1 for each query's most similar keys, -1 for its least similar, 0 between."""
    keys = key.shape[2]
    if keys < 2:
        raise InputError(f"hashing needs two keys or more to tell similar from dissimilar, not {keys}")
    scores = query @ key.mT
    pairs = min(PAIRS, keys // 2)
    similar = torch.zeros_like(scores)
    similar.scatter_(3, scores.topk(pairs, largest=False).indices, -1.0)
    return similar.scatter_(3, scores.topk(pairs).indices, 1.0)


def _fit_bits(of_query: Tensor, of_key: Tensor, similar: Tensor, bits: int) -> Tensor:
    """Return weights (H, P, bits) for kernel features (B, H, Nq, P), (B, H, Nk, P) and labels S (B, H, Nq, Nk)."""
    residual = similar * bits
    weights = []
    for _ in range(bits):
        first = _spectral(of_query, of_key, residual)
        best, agreement, sign_q, sign_k = first, *_signs(of_query, of_key, residual, first)
        refined = _descend(of_query, of_key, residual, first)
        _, candidate, candidate_q, candidate_k = refined, *_signs(of_query, of_key, residual, refined)
        better = candidate > agreement
        best = torch.where(better[:, None, None], refined, first)
        sign_q = torch.where(better[:, None, None], candidate_q, sign_q)
        sign_k = torch.where(better[:, None, None], candidate_k, sign_k)
        residual = residual - sign_q @ sign_k.mT
        weights.append(best)
    return torch.cat(weights, -1)


def _spectral(of_query: Tensor, of_key: Tensor, residual: Tensor) -> Tensor:
    """Return the weights (H, P, 1) that maximise y_q^T R y_k for real-valued y of unit variance: an eigenvector."""
    product = (of_query.mT @ (residual @ of_key)).sum(0)
    variance = (of_query.mT @ of_query).sum(0) + (of_key.mT @ of_key).sum(0)
    values, vectors = torch.linalg.eigh(variance)
    # Directions the samples barely use would be blown up.
    floor = values[:, -1:] * 1e-4 + torch.finfo(values.dtype).tiny
    whitener = vectors * values.clamp(min=floor).rsqrt().unsqueeze(1)
    symmetric = whitener.mT @ (product + product.mT) @ whitener
    weight = whitener @ torch.linalg.eigh(symmetric).eigenvectors[:, :, -1:]
    tokens = of_query.shape[0] * (of_query.shape[2] + of_key.shape[2])
    scaled: Tensor = weight * math.sqrt(tokens)
    return scaled


def _descend(of_query: Tensor, of_key: Tensor, residual: Tensor, start: Tensor) -> Tensor:
    """Return `start` after gradient steps on -y_q^T R y_k / sum |R|, with softened signs tanh(z / 2), as published."""
    size = residual.abs().sum((0, 2, 3)).clamp(min=1)
    with torch.enable_grad():
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=STEP_SIZE)
        for _ in range(STEPS):
            soft_query, soft_key = torch.tanh(of_query @ weight / 2), torch.tanh(of_key @ weight / 2)
            agreement = (soft_query * (residual @ soft_key)).sum((0, 2, 3))
            (weight.grad,) = torch.autograd.grad(-(agreement / size).sum(), weight)
            optimizer.step()
    return weight.detach()


def _signs(of_query: Tensor, of_key: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y_q^T R y_k of each head (H,), and the signs y_q, y_k (B, H, N, 1) themselves."""
    y_query, y_key = (torch.where(features @ weight > 0, 1.0, -1.0) for features in (of_query, of_key))
    return (y_query * (residual @ y_key)).sum((0, 2, 3)), y_query, y_key
