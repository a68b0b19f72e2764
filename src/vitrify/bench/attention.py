"""The attention core alone: PyTorch's fused softmax attention (SDPA) against Taylor attention, at equal inputs.

Both are timed on contiguous (batch, heads, tokens, head_dim) tensors and, since no model produces those, on the strides
that timm's packed projection leaves behind: views of one (batch, tokens, 3, heads, head_dim) tensor.
With `backward` both passes are timed, and the gradients are what is checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitrify.bench.reference import Kind, check_attention, check_gradients
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.roofline import Cost
from vitrify.errors import InputError
from vitrify.ops import taylor_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROTATION_BYTES = 2**28
"""Rotate through about this much input, so that a fast contender does not read its input from cache..."""
MAX_ROTATION = 4
"""... but through at most this many inputs, as a small input is in cache in a real model, too."""


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Three = tuple[Tensor, Tensor, Tensor]
SDPA, TAYLOR = "SDPA", "Taylor"
FUSED = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
"""The kernels among which "SDPA" picks one on a GPU, each by itself, to show which it is and whether it is the best."""


@dataclass(frozen=True)
class Inputs:
    """Packed queries, keys and values, the same three contiguous, and a gradient of the result.

    packed: (batch, tokens, 3, heads, head_dim), of which `views` are the (batch, heads, tokens, head_dim) of each.
    contiguous: three of (batch, heads, tokens, head_dim). upstream: (batch, heads, tokens, head_dim), contiguous, and
    the same as a view of (batch, tokens, heads, head_dim), as the projection that follows leaves it.
    """

    packed: Tensor
    contiguous: Three
    upstream: tuple[Tensor, Tensor]


def views(packed: Tensor) -> Three:
    """Return query, key and value (batch, heads, tokens, head_dim) of (batch, tokens, 3, heads, head_dim)."""
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def prepare(case: Case) -> Prepared:
    """Prepare a case: `tokens`, `heads`, `head_dim`, `batch_size` (int), `dtype`, `device` (str), `compile` (bool).

    `backward` (bool, False if absent): time forward and backward, down to the gradient of the packed or contiguous
    inputs, given that of the result.

    Raises:
        InputError: a size below 1, or a dtype other than float32, bfloat16 and float16.
    """
    for field in ("tokens", "heads", "head_dim", "batch_size"):
        if case[field] < 1:
            raise InputError(f"{field} must be at least 1, not {case[field]}")
    if case["dtype"] not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {case['dtype']!r}")
    batch, tokens, heads, width = (int(case[name]) for name in ("batch_size", "tokens", "heads", "head_dim"))
    dtype, device = DTYPES[case["dtype"]], torch.device(case["device"])

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        packed = torch.randn(batch, tokens, 3, heads, width, generator=generator, device=device).to(dtype)
        query, key, value = (view.contiguous() for view in views(packed))
        upstream = (
            torch.randn(batch, tokens, heads, width, generator=generator, device=device).to(dtype).transpose(1, 2)
        )
        return Inputs(packed, (query, key, value), (upstream.contiguous(), upstream))

    attends: dict[str, Attend] = {SDPA: F.scaled_dot_product_attention, TAYLOR: taylor_attention}
    if case["compile"]:
        attends |= {f"{name} compiled": torch.compile(attends[name], fullgraph=True, dynamic=False) for name in attends}
    not_run: dict[str, str] = {}
    if device.type == "cuda":
        for name, backend in FUSED.items():
            why = objection(backend, torch.zeros(1, 1, tokens, width, dtype=dtype, device=device), _backward(case))
            attends |= {name: _by(backend)} if why is None else {}
            not_run |= {} if why is None else {name: why}
    contenders = [
        _contender(_name(name, layout), attend, layout, case)
        for layout in ("", " packed")
        for name, attend in attends.items()
    ]
    input_bytes = batch * tokens * 3 * heads * width * dtype.itemsize * 2
    return Prepared(
        inputs=inputs,
        contenders=contenders,
        baselines={c.name: _baseline(c.name) for c in contenders},
        device=device,
        dtype=dtype,
        rotation=min(max(ROTATION_BYTES // input_bytes, 2), MAX_ROTATION),
        not_run=not_run,
    )


def cost(kind: Kind, case: Case) -> Cost:
    """Return the products (docs/papers.md 2; a multiply-add is two operations); Q, K, V and the result move once.

    With backward: twice the products more, as each of the forward's has two gradients (no product is made again), and
    Q, K, V and the result's gradient are read once more, three gradients written.
    """
    batch, n, heads, d = (int(case[name]) for name in ("batch_size", "tokens", "heads", "head_dim"))
    multiplications = 2 * n * n * d if kind == "softmax" else 2 * n * d * d + d * d
    passes, tensors = (3, 4 + 7) if _backward(case) else (1, 4)
    itemsize = DTYPES[case["dtype"]].itemsize
    return Cost(2 * batch * heads * passes * multiplications, tensors * batch * heads * n * d * itemsize)


def objection(backend: SDPBackend, example: Tensor, backward: bool) -> str | None:
    """Return why `backend` does not take inputs like `example` (batch, heads, tokens, width), None if it does.

    It is tried: what PyTorch warns of then is the reason.
    """
    query = example.detach().requires_grad_(backward)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _by(backend)(query, query, query)
        except RuntimeError as error:
            reasons = [str(warning.message).split(" (Triggered")[0] for warning in caught]
            return " ".join(" ".join(reasons or [str(error)]).split())[:300]
    return None


def _by(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return attend


def _backward(case: Case) -> bool:
    return bool(case.get("backward", False))


def _name(name: str, layout: str) -> str:
    plain, compiled, _ = name.partition(" compiled")
    return f"{plain}{layout}{compiled}"


def _baseline(name: str) -> str:
    return name.replace(TAYLOR, SDPA).replace(" flash", "").replace(" cuDNN", "")


def _contender(name: str, attend: Attend, layout: str, case: Case) -> Contender:
    kind: Kind = "taylor" if name.startswith(TAYLOR) else "softmax"

    def forward(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return attend(*(views(inputs.packed) if layout else inputs.contiguous))

    def both(inputs: Inputs) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in ((inputs.packed,) if layout else inputs.contiguous)]
        output = attend(*(views(leaves[0]) if layout else leaves))
        return torch.autograd.grad(output, leaves, inputs.upstream[1 if layout else 0])

    def check(inputs: Inputs) -> Check:
        query, key, value = inputs.contiguous
        scale = query.shape[-1] ** -0.5
        if not _backward(case):
            return check_attention(forward(inputs), query, key, value, scale=scale, kind=kind)
        found = both(inputs)
        gradients = views(found[0]) if layout else found
        return check_gradients(gradients, query, key, value, inputs.upstream[0], scale=scale, kind=kind)

    return Contender(name, both if _backward(case) else forward, check, cost(kind, case))
