"""Writes down what a model does on tensors without values: every ATen call, its module, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitrify.cost.aten import Call, apply_rule
from vitrify.cost.builder import Builder
from vitrify.cost.elementwise import FACTORIES, VIEWS
from vitrify.cost.graph import Operand
from vitrify.cost.kernels import attention
from vitrify.cost.tensors import bits_of, key


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Appends what runs under it to `builder`, unless paused."""

    def __init__(self, builder: Builder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.builder = builder
        self._paused = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run without recording: for results whose making was recorded in another way."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def operand(self, tensor: Tensor) -> Operand:
        """Return what is known of a tensor."""
        return self.builder.tensors.operand(tensor)

    def bind(self, tensor: Tensor, operand: Operand) -> Tensor:
        """Say that `tensor` holds `operand`, and return it."""
        self.builder.tensors.bind(tensor, operand)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the call and record it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._paused and func.namespace != "prim":
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        outs = _tensors(out)
        if not outs:
            return
        name: str = func.overloadpacket.__name__
        tensors, read = self.builder.tensors, _tensors((args, kwargs))
        written = None if name in VIEWS else _written(func, args, kwargs)
        storages = {key(tensor) for tensor in read}
        if written is None and all(key(tensor) in storages for tensor in outs):
            return  # a view
        name = name if written is None else name.removesuffix("_")
        if name in FACTORIES or all(tensors.is_constant(tensor) for tensor in read):
            for tensor in outs:
                tensors.bind_constant(tensor)
            return
        inputs = [tensors.operand(tensor) for tensor in read]
        if name == "_to_copy" and inputs[0].bits == 1:
            tensors.bind(outs[0], inputs[0])  # codes have one width, whatever dtype they pass through
            return
        partly = written is not None and not tensors.is_whole(written)
        if written is not None and partly:
            inputs.append(tensors.whole(written))
        result = apply_rule(self.builder, Call(func, name, args, kwargs, tuple(inputs), outs[0]))
        if result is None:
            # What it computes is not known; what it writes is, and the graph must not break here.
            self.builder.unknown[str(func)] += 1
            result = self.builder.vector("move", inputs, outs[0].shape, bits=bits_of(outs[0]))
        if written is None:
            tensors.bind(outs[0], result)
        else:
            tensors.rebind(written, result)
        # Batch norm's further results are statistics for training: empty on a CPU, but not on the meta device.
        for extra in outs[1:] if "batch_norm" not in name else ():
            if extra.numel() and key(extra) not in storages:
                self._bind_extra(extra)

    def _bind_extra(self, tensor: Tensor) -> None:
        like = Operand("", tuple(tensor.shape), bits_of(tensor), "activation")
        self.builder.tensors.bind(tensor, self.builder.extra_output(like))


class Attention(TorchFunctionMode):
    """Records scaled_dot_product_attention by what it computes, before PyTorch picks a kernel, or none, by device.

    Called from within torch.nn (MultiheadAttention) it is out of reach, and `aten` meets whatever was picked.
    """

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace the one function."""
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with self._tracer.paused():
            out = func(*args, **kwargs)
            if out.dim() == 4:  # laid out as the fused kernels do: merging the heads copies nothing
                out = out.new_empty(out.transpose(1, 2).shape).transpose(1, 2)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        q, k, v = (self._tracer.operand(given[name]) for name in names[:3])
        mask = None if given.get("attn_mask") is None else self._tracer.operand(given["attn_mask"])
        causal = bool(given.get("is_causal"))
        result = attention(self._tracer.builder, q, k, v, mask, causal=causal)
        return self._tracer.bind(out, result)


@contextmanager
def tracing(tracer: Tracer, model: nn.Module) -> Iterator[None]:
    """Record what runs inside, with the module of `model` that it belongs to; `model` is the tracer's own copy."""
    modules = tracer.builder.modules

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: modules.append(name)

    def leave(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            # Modules whose forward raised, in a model that went on, are still there.
            while modules.pop() != name:
                pass

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(enter(name), prepend=True)
        module.register_forward_hook(leave(name))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        # Fused kernels of nn.TransformerEncoder, which only plain inference takes.
        torch.backends.mha.set_fastpath_enabled(False)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(tracer)
        stack.enter_context(Attention(tracer))
        yield


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the tensor that the call writes in place, if there is one."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor):
                return value
    return None


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
