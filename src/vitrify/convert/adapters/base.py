"""What an adapter is, and the swap it makes.

An adapter subclasses one attention class of a model library. Converting sets `module.__class__` to the adapter and adds
`core` (and `value_conv`): the object, its children, Parameters, hooks, mode and `isinstance` stay what they were, and
setting the class back undoes it. The adapter's forward has the source's signature; it projects, calls `attend`, and
merges as the source does.

To support another class: subclass `Adapter` and the class, write `forward` with `self.attend(...)` in place of the
attention itself, `softmax_core`, `example_inputs` and `value_channels`, and name both in `adapters/__init__.py`, or
`register` the adapter there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from vitrify.convert.copies import detached_copy, randomise
from vitrify.convert.specs import AttentionSpec
from vitrify.errors import UnsupportedError
from vitrify.nn import Core, CoreAttention, Hamming, Softmax, Taylor, TaylorSparse, TokenGrid, ValueConv

# accelerate's hooks and monkeypatches live on the instance, where no class is asked.
OWN_FORWARD = "has a `forward` of its own, which hides its class's (accelerate's hooks do that): convert first"


class Adapter(CoreAttention):
    """Base of the adapters. Class methods take the module, before or after the swap."""

    source: ClassVar[type[nn.Module]]
    token_grid: TokenGrid | None
    attention_spec: AttentionSpec = AttentionSpec()
    """What `convert_` last made of this module, by whichever call."""

    if TYPE_CHECKING:
        # What the source class owns; model libraries ship no types.
        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def softmax_core(cls, module: Any) -> Softmax:
        """Return the softmax core that repeats the source's own path, bit for bit."""
        raise NotImplementedError

    @classmethod
    def example_inputs(cls, module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) of a small random call of the source's forward, on the CPU in float32."""
        raise NotImplementedError

    @classmethod
    def value_channels(cls, module: Any) -> int:
        """Return heads * value width: the channels of a value_conv."""
        raise NotImplementedError

    @classmethod
    def conv_kernel(cls, value_conv: int) -> tuple[int, int]:
        """Return (height, width) of the kernel of a value_conv of that size."""
        return value_conv, value_conv

    @classmethod
    def query_heads(cls, module: Any) -> tuple[int, int]:
        """Return (heads, width of a query or key): what codes are made of."""
        return int(module.num_heads), int(module.head_dim)

    @classmethod
    def dropout_p(cls, module: Any) -> float:
        """Return the probability with which the source drops attention weights in training."""
        return float(module.attn_drop.p)

    @classmethod
    def refusal(cls, module: Any, spec: AttentionSpec) -> str | None:
        """Return why this module cannot become what `spec` says, or None. Extend it in a family with more limits."""
        p = cls.dropout_p(module)
        if spec.core != "softmax" and p > 0:
            return f"attention dropout {p:g} has no exact form without attention weights: build the model with 0"
        return None

    @classmethod
    def remark(cls, module: Any, spec: AttentionSpec) -> str:
        """Return what a reader of the Conversion should know about this change beside the spec, or nothing."""
        return ""

    @classmethod
    def idles(cls, module: Any) -> bool:
        """Return whether the module, as it is now, owns parameters that its forward leaves out."""
        return False

    @classmethod
    def find_grid(cls, module: Any, ancestors: Sequence[nn.Module]) -> TokenGrid | str | None:
        """Return where a value_conv learns the token grid at run time, or the reason why it cannot.

        `ancestors`: the modules around `module`, the model first. A grid that must watch another module registers its
        hook here; None means that the grid comes with each call.
        """
        return "the token grid of this module is unknown, so there is nothing to convolve V over"


def make_core(spec: AttentionSpec, adapter: type[Adapter], module: nn.Module) -> Core:
    """Return the core that `spec` asks for."""
    if spec.core == "softmax":
        return adapter.softmax_core(module)
    if spec.core == "taylor":
        return Taylor(squares=spec.squares, bias=spec.bias)
    device, dtype = like(module).device, like(module).dtype
    if spec.core == "hamming":
        return Hamming(
            *adapter.query_heads(module),
            order=spec.order,
            codes=spec.codes,
            binariser=spec.binariser,
            share=spec.share_codes,
            form=spec.form,
            bias=spec.bias,
            device=device,
            dtype=dtype,
        )
    low_rank = spec.core == "taylor_sparse"
    return TaylorSparse(spec.threshold, spec.bits, low_rank=low_rank, bias=spec.bias, device=device)


def adopt(module: Any, adapter: type[Adapter], core: Core, value_conv: int = 0, grid: TokenGrid | None = None) -> None:
    """Swap `module` to `adapter` in place, with that core; a core already there is replaced.

    A value_conv of the same kernel size stays, with its weights.
    """
    previous = module.value_conv if isinstance(module, adapter) else None
    module.__class__ = adapter
    module.token_grid = grid
    module.core = core.train(module.training)
    if not value_conv:
        module.value_conv = None
        return
    kernel = adapter.conv_kernel(value_conv)
    if not isinstance(previous, ValueConv) or previous.conv.kernel_size != kernel:
        weight = like(module)
        conv = ValueConv(adapter.value_channels(module), kernel, device=weight.device, dtype=weight.dtype)
        module.value_conv = conv.train(module.training)


def objection(module: nn.Module, adapter: type[Adapter], spec: AttentionSpec) -> str | None:
    """Return why `module` cannot become what `spec` says, or None: its adapter refuses, or a trial run fails."""
    if "forward" in module.__dict__:
        return OWN_FORWARD
    try:
        return adapter.refusal(module, spec) or (None if isinstance(module, Adapter) else verify(module, adapter))
    except Exception as error:  # replaced children (LoRA, quantised) may lack anything; leave the module alone
        return f"a trial run failed: {type(error).__name__}: {error}"


def verify(module: nn.Module, adapter: type[Adapter]) -> str | None:
    """Return None if the adapter reproduces the source's forward bit for bit, else what differs.

    Both run on a copy with random parameters and buffers, in evaluation mode: freshly built models hide mistakes
    behind zero-initialised norms, and trained ones must not be disturbed. Raises whatever the copy or its source does.
    """
    copy = detached_copy(module)
    generator = torch.Generator().manual_seed(0)
    randomise(copy, generator)
    for child in copy.modules():
        child.training = False
    args, kwargs = adapter.example_inputs(module)
    dtype, device = like(copy).dtype, like(copy).device
    args = tuple(a.to(device, dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    with torch.no_grad():
        expected = adapter.source.forward(copy, *args, **kwargs)
        adopt(copy, adapter, adapter.softmax_core(copy))
        actual = adapter.forward(copy, *args, **kwargs)
    before, after = _tensors(expected), _tensors(actual)
    if len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return None
    return "the adapter does not reproduce this module's output: its class may have changed since it was written"


def like(module: nn.Module) -> torch.Tensor:
    """Return the module's first floating-point parameter: what new parts take their device and dtype from.

    Raises UnsupportedError if it has none.
    """
    found = next((p for p in module.parameters() if p.is_floating_point()), None)
    if found is None:
        raise UnsupportedError(f"{type(module).__name__} has no floating-point parameter to take a dtype from")
    return found


def watching(module: nn.Module, cls: type[TokenGrid]) -> Any:
    """Return the grid whose hook is already on `module`, so that converting again does not add a second one."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, cls)), None)


def release_grids(model: nn.Module) -> None:
    """Remove the hooks of token grids that no attention in `model` reads any more."""
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    in_use = {id(m.token_grid) for m in adapters if m.value_conv is not None}
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, TokenGrid) and id(owner) not in in_use:
                del module._forward_pre_hooks[key]


def _tensors(output: Any) -> list[torch.Tensor]:
    outputs = output if isinstance(output, (tuple, list)) else [output]
    return [o for o in outputs if isinstance(o, torch.Tensor)]
