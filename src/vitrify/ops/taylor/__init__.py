"""Taylor attention (ViTALiTy, Algorithm 1): linear in the tokens, affine in the queries. The maths is in README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from vitrify.errors import InputError, unknown
from vitrify.ops import gpu
from vitrify.ops.autocast import under_autocast, without_autocast
from vitrify.ops.taylor import aten, cpu, reference, sparse, squares, validation
from vitrify.ops.taylor.registration import taylor_attention_op
from vitrify.ops.tracing import exporting, fx_leaf

BACKENDS = ("aten", "cpu", "reference", "triton")
# What the backends take that are not for every device.
KERNELS = {"cpu": "tensors on the CPU", "triton": "tensors on an NVIDIA GPU (compute capability 8.0, Triton installed)"}


def backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the names that `taylor_attention(..., backend=)` takes for tensors on `device`."""
    device = torch.device(device)
    kernels = {"cpu": device.type == "cpu", "triton": gpu.available(device) or gpu.interpreting()}
    return tuple(name for name in BACKENDS if kernels.get(name, True))


def selected_backend(device: torch.device | str = "cpu") -> str:
    """Return the backend that `backend=None` picks for tensors on `device`: which kernel really runs.

    "cpu", the blocked kernel, on the CPU; "triton" on NVIDIA GPUs from compute capability 8.0 on where Triton is
    installed (it leaves float64 and heads wider than 128 to "aten"); "aten" on every other device, and on all while a
    graph is exported or traced.
    """
    device = torch.device(device)
    if exporting():
        return "aten"
    return "cpu" if device.type == "cpu" else "triton" if gpu.available(device) else "aten"


def _only_computing(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Say whether nobody watches: plain tensors in eager inference, with no mode, transform or compiler around.

    Then a CPU's or GPU's kernel may be called as it is. The op's way through the dispatcher and autograd costs 0.1 ms,
    where attention over 197 tokens takes 0.3 on a CPU.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(t) is Tensor for t in (query, key, value))
        and (query.device.type == "cpu" or gpu.available(query.device))
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
        and not under_autocast(query)
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and not exporting()
    )


@fx_leaf
def taylor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """First-order Taylor attention with centred keys: out = vbar + Q M, M = scale/n sum_j (k_j - kbar)^T (v_j - vbar).

    Shapes, float16 | bfloat16 | float32 | float64 (the first two are accumulated in float32):
        query (B, H, Nq, D), key (B, H, Nk, D), value (B, H, Nk, Dv) -> (B, H, Nq, Dv)
        attn_mask: bool key-padding mask (B, 1, 1, Nk) or (1, 1, 1, Nk), True = attend. Means and sums run over the
        valid keys; an image without any gets 0, as in SDPA.
    The result's memory is laid out as (B, Nq, H, Dv): `out.transpose(1, 2).flatten(2)` copies nothing.
    `scale` is 1/sqrt(D) by default. Under autocast the inputs are cast as SDPA's are.
    `backend`: None picks the kernel that `selected_backend` names, inside the registered op (closed-form backward)
    except while a graph is exported, and in plain eager inference, which calls the kernel as it is. "cpu" is the
    blocked kernel for CPU tensors, "triton" the kernels for NVIDIA GPUs (and, slowly, for any tensors if
    TRITON_INTERPRET=1 is set), both also in the op; "aten" plain PyTorch calls, differentiated by autograd;
    "reference" Algorithm 1 step by step in the inputs' dtype.

    Raises InputError (shapes, dtypes, scale, backend) and UnsupportedError (any mask but key padding).
    ViTALiTy, Algorithm 1; docs/papers.md 1, 2.
    """
    query, key, value, keep, scale = _prepare(query, key, value, attn_mask, scale)
    if backend in KERNELS and backend not in backends(query.device):
        takes = f"takes {KERNELS[backend]}, not on {query.device}"
        raise InputError(f"backend {backend!r} {takes}: leave it out, or 'aten'")
    out: Tensor
    if backend == "triton" and not gpu.available(query.device):
        out = gpu.kernels("taylor.triton").interpreted(query, key, value, keep, scale)
        return out
    if backend is None and _only_computing(query, key, value):
        kernels = cpu if query.device.type == "cpu" else gpu.kernels("taylor.triton")
        out, _ = kernels.forward(query, key, value, keep, scale)
        return out
    if backend in KERNELS or (backend is None and not exporting()):
        return taylor_attention_op(query, key, value, keep, scale)
    with without_autocast(query):
        if backend in (None, "aten"):
            return aten.forward(query, key, value, keep, scale)[0]
        if backend == "reference":
            return reference.algorithm1(query, key, value, keep, scale)
    raise unknown("backend", str(backend), BACKENDS)


@fx_leaf
def taylor_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    threshold: float | Tensor,
    bits: int = 4,
) -> tuple[Tensor, Tensor]:
    """Taylor attention corrected to softmax where the predictor expects strong attention: the training-time attention.

    out = taylor + (mask * (softmax - taylor_weights)) V; shapes, dtypes and mask as in `taylor_attention`.
    Returns (out, density): density is the kept share of the valid entries, 0-dim float32, without gradient.
    `threshold`: probability (number, or 0-dim tensor); 0 gives softmax attention exactly, above 1 Taylor exactly.
    The mask comes from queries and centred keys rounded to `bits` bits, per image and head, without gradient.

    Raises InputError and UnsupportedError as `taylor_attention` does, and for a bad threshold or bits.
    docs/papers.md 3.
    """
    validation.check_predictor(threshold, bits)
    query, key, value, keep, scale = _prepare(query, key, value, attn_mask, scale)
    low_rank = taylor_attention(query, key, value, attn_mask, scale=scale)
    with without_autocast(query):
        correction, density = sparse.residual(query, key, value, keep, scale, threshold, bits)
        return (low_rank + correction).to(query.dtype), density


@fx_leaf
def sparse_softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    threshold: float | Tensor,
    bits: int = 4,
) -> tuple[Tensor, Tensor]:
    """Softmax over the entries the predictor keeps, and nothing else: Sanger's sparse attention, the baseline.

    Arguments, shapes, errors and density as in `taylor_sparse_attention`. A row with no kept entry gives 0; that needs
    a threshold above 1/n, since the largest of n probabilities is never below 1/n.
    """
    validation.check_predictor(threshold, bits)
    query, key, value, keep, scale = _prepare(query, key, value, attn_mask, scale)
    with without_autocast(query):
        out, density = sparse.sparse_softmax(query, key, value, keep, scale, threshold, bits)
        return out.to(query.dtype), density


@fx_leaf
def sparse_mask(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    threshold: float | Tensor,
    bits: int = 4,
) -> Tensor:
    """The predictor's mask, bool (B, H, Nq, Nk): where softmax of the `bits`-bit scores is at least `threshold`."""
    validation.check_predictor(threshold, bits)
    query, key, _, keep, scale = _prepare(query, key, key, attn_mask, scale)
    with without_autocast(query), torch.no_grad():
        query, key = (t.to(aten.accumulate_dtype(t.dtype)) for t in (query, key))
        centred, *_ = aten.centre(keep, key, key)
        return sparse.predict(query, centred, keep, scale, threshold, bits)


@fx_leaf
def taylor_squares_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Taylor attention with the squares of the second-order term: weights ~ 1 + x_ij + scale^2/2 sum_a q_ia^2 k^_ja^2.

    Shapes, dtypes, mask and errors as in `taylor_attention`; cost O(n d^2). Rows are divided by their sum, which is at
    least n. Single weights may be negative, as in first order. After QT-ViT (NeurIPS 2024); docs/papers.md 4.
    """
    query, key, value, keep, scale = _prepare(query, key, value, attn_mask, scale)
    with without_autocast(query):
        return squares.forward(query, key, value, keep, scale)


@fx_leaf
def taylor_weights(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """The dense matrix that Taylor attention never forms: (1 + scale q.k^) / n, (B, H, Nq, Nk), for pictures and tests.

    Rows sum to 1 over the valid keys, padded keys get 0, entries may be negative. Computed in the inputs' dtype.
    """
    query, key, _, keep, scale = _prepare(query, key, key, attn_mask, scale)
    with without_autocast(query):
        return reference.weights(query, key, keep, scale)


def _prepare(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Apply autocast's dtype, as it would for SDPA, and check the arguments; the mask comes back as (B, Nk)."""
    if isinstance(query, Tensor) and under_autocast(query):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    validation.check_inputs(query, key, value)
    keep = validation.check_mask(attn_mask, query, key)
    return query, key, value, keep, validation.check_scale(scale, query)
