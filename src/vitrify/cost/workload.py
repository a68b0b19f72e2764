"""`workload`: the graph of what one forward pass of a model does, traced from the model itself. See README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from vitrify.convert.copies import on_shapes
from vitrify.convert.tokens import check_input_size
from vitrify.cost.builder import Builder
from vitrify.cost.graph import Operand, Workload
from vitrify.cost.leaves import install
from vitrify.cost.shapes import copy_of_shapes
from vitrify.cost.steps import label_attention
from vitrify.cost.tensors import bits_of
from vitrify.cost.trace import Tracer, tracing
from vitrify.errors import InputError, UnsupportedError, unknown

TaylorForm = Literal["affine", "algorithm1"]
__all__ = ["TaylorForm", "Workload", "workload"]


def workload(
    model: nn.Module,
    input_size: tuple[int, int, int] = (3, 224, 224),
    batch_size: int = 1,
    *,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    taylor: TaylorForm = "affine",
    split: Mapping[str, float] | None = None,
) -> Workload:
    """Return what one forward pass in eval mode does, as a graph of typed operations.

    model           any module, converted or not, on any device, "meta" included; it is neither run nor changed. A copy
                    of it runs on tensors that have shapes and no memory.
    input_size      (channels, height, width) of an image, in the dtype of the model's parameters
    example_inputs  what to call the model with instead: a tensor, positional arguments, or keyword arguments
    taylor          how first-order Taylor attention is computed: "affine", as `ops.taylor_attention` does (steps "M"
                    and "apply"), or ViTALiTy's "algorithm1" (steps "1" to "6")
    split           share of the tokens that each expert of a mixture gets, by expert: {"multiply": 0.4, "shift": 0.6}.
                    By default what the mixture's last forward measured; before one, what its latencies ask for

    Raises InputError for arguments that are wrong and an input that the model refuses, UnsupportedError naming the
    module where a model decides by the values of its tensors, which a trace has none of.
    """
    if taylor not in get_args(TaylorForm):
        raise unknown("taylor form", str(taylor), get_args(TaylorForm))
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model must be a torch.nn.Module, not {type(model).__name__}: vitrify.create_model builds one"
        )
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise InputError(f"batch_size must be a positive whole number, not {batch_size!r}")
    if example_inputs is None:
        size = check_input_size(input_size)
        example_inputs = torch.empty(batch_size, *size, dtype=_dtype(model), device="meta")
    args, kwargs = _arguments(example_inputs)
    return on_shapes(model, lambda mode: _workload(model, args, kwargs, taylor, split, mode))


def _workload(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    taylor: TaylorForm,
    split: Mapping[str, float] | None,
    mode: FakeTensorMode | None,
) -> Workload:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shapes = copy_of_shapes(model, mode)
    with mode or nullcontext():
        args, kwargs = tree_map_only(
            Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), (args, kwargs)
        )
    builder = Builder()
    builder.tensors.add_weights(shapes)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    for index, tensor in enumerate(inputs):
        name = f"input{index or ''}"
        builder.tensors.bind(tensor, Operand(name, tuple(tensor.shape), bits_of(tensor), "activation"))
    tracer = Tracer(builder)
    install(tracer, shapes, model, taylor, split)
    _run(tracer, mode, shapes, args, kwargs)
    label_attention(builder)
    return Workload(
        model=type(model).__name__,
        input_shape=tuple(inputs[0].shape) if inputs else (),
        operations=tuple(builder.operations),
        unknown=dict(builder.unknown),
    )


def _run(tracer: Tracer, mode: FakeTensorMode | None, model: nn.Module, args: Any, kwargs: Any) -> None:
    try:
        with mode or nullcontext(), tracing(tracer, model):
            model(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedError(
            f"{_where(tracer, model)} decides by the values of its tensors ({error}), and a trace has only their "
            "shapes: trace the modules around it by themselves"
        ) from error
    except InputError:
        raise
    except Exception as error:
        if "tensor subclasses" in str(error):  # .numpy() and .data_ptr(): they look at values too
            raise UnsupportedError(f"{_where(tracer, model)} reads the values of its tensors: {error}") from error
        shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        raise InputError(
            f"{type(model).__name__} refuses inputs of shape {', '.join(map(str, shapes))}, at "
            f"{_where(tracer, model)}: {type(error).__name__}: {error}"
        ) from error


def _where(tracer: Tracer, model: nn.Module) -> str:
    name = tracer.builder.modules[-1]
    return f"{name or 'the model'} ({type(model.get_submodule(name)).__name__})"


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise InputError(
        "example_inputs must be a tensor, a sequence of arguments or a mapping of keyword arguments, not "
        f"{type(example_inputs).__name__}"
    )


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
