"""Kernelised supervised hashing (KSH), EcoFormer's binariser: codes fitted so that similar tokens share bits.

    k(x)_a = exp(-|x - anchor_a|^2 / (2 width)) - mean_a,     bit_r = 1 if sum_a k(x)_a weight_ar > 0

The fit (Liu et al., CVPR 2012; EcoFormer, NeurIPS 2022): S_ij is +1 for the 10 keys most similar to query i, -1 for the
10 least similar, else 0. Bits are fitted one after another; each maximises y_q^T R y_k for its vectors of signs, where
R starts as bits * S, and the outer product of what a bit got is taken from R before the next one (greedy residual).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrify.errors import InputError, VitrifyError
from vitrify.nn.binarise import Binariser, Codes, binarise
from vitrify.ops.autocast import without_autocast
from vitrify.ops.taylor.aten import accumulate_dtype
from vitrify.ops.tracing import fx_leaf

PAIRS = 10  # most and least similar keys of each query: the labels
STEPS = 100  # gradient steps per bit
STEP_SIZE = 0.05  # Adam's, for weights scaled to give projections of unit variance
# Per image, drawn for the fit. Labels are an n x n matrix, of which 20 n are not 0: with fewer tokens a larger share.
TOKENS = 64
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
            raise VitrifyError(
                "hashing is not fitted: call calibrate_codes_(model, images), as `vitrify convert --calibrate` and "
                "`vitrify finetune` do, or load fitted weights"
            )
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
        similar = _labels(query, key).transpose(0, 1).contiguous()
        if key_binariser is None:
            self._place_anchors(torch.cat((query, key), 2), generator)
            self.weight.copy_(_fit_bits(self._features(query), self._features(key), similar, self.code_dim))
        else:
            self._place_anchors(query, generator)
            key_binariser._place_anchors(key, generator)
            # One long weight vector for both: queries see its first part, keys its second.
            own, other = self.anchors.shape[1], key_binariser.anchors.shape[1]
            of_query = F.pad(self._features(query), (0, 0, 0, other))
            of_key = F.pad(key_binariser._features(key), (0, 0, own, 0))
            weight = _fit_bits(of_query, of_key, similar, self.code_dim)
            self.weight.copy_(weight[:, :own])
            key_binariser.weight.copy_(weight[:, own:])
            key_binariser.fitted = True
        self.fitted = True

    def needs_fit(self) -> bool:
        """Say whether the hash has no anchors yet."""
        return not self.fitted

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
        self.width.copy_(distances.mean((0, 2, 3)).clamp(min=torch.finfo(self.width.dtype).tiny)[:, None, None])
        self.mean.copy_(torch.exp(-distances / (2 * self.width.float())).mean((0, 2)).unsqueeze(1))

    def _features(self, x: Tensor) -> Tensor:
        """Return the kernel of samples (B, H, N, D) as columns, (H, A, B N)."""
        return _kernel(x, self.anchors, self.width, self.mean).permute(1, 3, 0, 2).flatten(2)

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
    """Return weights (H, P, bits) for kernel features (H, P, B Nq), (H, P, B Nk) and labels S (H, B, Nq, Nk).

    Weights and signs are kept as rows (H, 1, .): a product with a column takes several times as long.
    """
    residual = similar * bits
    weights = []
    for _ in range(bits):
        spectral = _spectral(of_query, of_key, residual)
        refined = _descend(of_query, of_key, residual, spectral)
        worse = _agreement(of_query, of_key, residual, refined) < _agreement(of_query, of_key, residual, spectral)
        weight = torch.where(worse[:, None, None], spectral, refined)
        sign_query, sign_key = _per_image(_signs(of_query, weight), _signs(of_key, weight), residual)
        residual = residual - sign_query.mT @ sign_key
        weights.append(weight)
    return torch.cat(weights, 1).mT


def _spectral(of_query: Tensor, of_key: Tensor, residual: Tensor) -> Tensor:
    """Return the weights (H, 1, P) that maximise y_q R y_k for real-valued y of unit variance: an eigenvector."""
    heads, images, queries, keys = residual.shape
    split_query, split_key = (
        f.view(heads, -1, images, f.shape[2] // images).transpose(1, 2) for f in (of_query, of_key)
    )
    product = (split_query @ residual @ split_key.mT).sum(1)
    variance = of_query @ of_query.mT + of_key @ of_key.mT
    values, vectors = torch.linalg.eigh(variance)
    # Directions that the samples barely use would be blown up.
    floor = values[:, -1:] * 1e-4 + torch.finfo(values.dtype).tiny
    whitener = vectors * values.clamp(min=floor).rsqrt().unsqueeze(1)
    symmetric = whitener.mT @ (product + product.mT) @ whitener
    weight: Tensor = (whitener @ torch.linalg.eigh(symmetric).eigenvectors[:, :, -1:]).mT
    return weight * math.sqrt(images * (queries + keys))


def _descend(of_query: Tensor, of_key: Tensor, residual: Tensor, start: Tensor) -> Tensor:
    """Return `start` after gradient steps on -y_q R y_k / sum |R|, with softened signs tanh(z / 2), as published."""
    size = residual.abs().sum((1, 2, 3)).clamp(min=1)
    with torch.enable_grad():
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=STEP_SIZE)
        for _ in range(STEPS):
            soft_query, soft_key = torch.tanh(weight @ of_query / 2), torch.tanh(weight @ of_key / 2)
            loss = -(_product(soft_query, soft_key, residual) / size).sum()
            (weight.grad,) = torch.autograd.grad(loss, weight)
            optimizer.step()
    return weight.detach()


def _agreement(of_query: Tensor, of_key: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Return y_q R y_k of each head (H,), for the signs y that the weights give."""
    return _product(_signs(of_query, weight), _signs(of_key, weight), residual)


def _product(y_query: Tensor, y_key: Tensor, residual: Tensor) -> Tensor:
    y_query, y_key = _per_image(y_query, y_key, residual)
    return (y_query @ residual * y_key).sum((1, 2, 3))


def _per_image(y_query: Tensor, y_key: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return (H, 1, B Nq) and (H, 1, B Nk) as (H, B, 1, Nq) and (H, B, 1, Nk)."""
    _, images, queries, keys = residual.shape
    return y_query.view(-1, images, 1, queries), y_key.view(-1, images, 1, keys)


def _signs(features: Tensor, weight: Tensor) -> Tensor:
    return torch.where(weight @ features > 0, 1.0, -1.0)
