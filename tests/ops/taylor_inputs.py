"""Inputs and tolerances for the tests of the Taylor ops."""

from __future__ import annotations

import torch
from torch import Tensor


def qkv(
    batch: int, heads: int, queries: int, keys: int, dim: int, value_dim: int, *, seed: int = 0, offset: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 query, key and value of unit variance; `offset` is added to every entry of key and value."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int, width: int) -> Tensor:
        return torch.randn(batch, heads, tokens, width, generator=generator, dtype=torch.float64)

    return draw(queries, dim), draw(keys, dim) + offset, draw(keys, value_dim) + offset


def padding(batch: int, keys: int, *, seed: int = 0) -> Tensor:
    """Return a key-padding mask (B, 1, 1, Nk) with holes, not only a tail, and at least one valid key per image."""
    keep = torch.rand(batch, 1, 1, keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    keep[..., 0] = True
    return keep


def packed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lay self-attention inputs out as timm's qkv projection does, (B, N, 3, H, D); return the permuted views."""
    joint = torch.stack([t.transpose(1, 2) for t in (query, key, value)], 2).contiguous()
    unpacked = joint.permute(2, 0, 3, 1, 4).unbind(0)
    return unpacked[0], unpacked[1], unpacked[2]


def scattered(t: Tensor, seed: int, fill: float = torch.nan) -> Tensor:
    """Lay `t` out with its axes in a random order and gaps of `fill` between, as if cut out of some larger tensor."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(4, generator=generator).tolist()
    pads = torch.randint(0, 3, (4,), generator=generator).tolist()
    storage = torch.full([t.shape[axis] + pad for axis, pad in zip(order, pads, strict=True)], fill, dtype=t.dtype)
    view = storage[tuple(slice(pad, None) for pad in pads)].permute([order.index(axis) for axis in range(4)])
    return view.copy_(t)


def moved(t: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return `t` on a device with the strides that it has: `.to` closes gaps and writes expanded axes out."""
    whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return whole.to(device, dtype).as_strided(t.shape, t.stride(), t.storage_offset())


def assert_as_good_as(actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Assert that `actual` errs at most twice as much as `plain`, the same arithmetic in plain PyTorch, plus rounding.

    Both are compared with `truth`, float64; one rounding of the result to the dtype of `actual` is allowed on top.
    In float64 `plain` is the truth itself: there the bound is 1e-12.
    """
    assert actual.isfinite().all()
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, truth, rtol=0, atol=1e-12)
        return
    error = (actual.double() - truth).abs().max()
    allowed = 2 * (plain.double() - truth).abs().max() + torch.finfo(actual.dtype).eps * truth.abs().max()
    assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e}"
