"""What is asked of a model before it is timed: that every part of it computes what its definition says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.bench.reference import check_attention, check_linear
from vitrify.bench.registry import Check
from vitrify.nn import ShiftLinear, cores
from vitrify.nn.attention import named_cores

Model = Callable[[Tensor], Tensor]


def check_identity(original: nn.Module, identity: nn.Module, images: Tensor) -> Check:
    """Compare a model with its own conversion by the softmax recipe, which must change nothing."""
    own, other = without_grad(original)(images), without_grad(identity)(images)
    return Check(_relative_error(own, other), 1e-6, "its conversion with the softmax recipe")


def check_parts(model: nn.Module, images: Tensor) -> Check:
    """Compare every attention core and shift layer with its float64 value, on the inputs it gets; return the worst.

    The model's output must be finite.
    """
    checks: list[Check] = []

    def compare(core: cores.Core, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        query, key, value = args[:3]
        if type(core) is cores.Taylor and kwargs.get("bias") is None and not core.squares:
            checks.append(check_attention(output, query, key, value, scale=kwargs["scale"], kind="taylor"))
        elif isinstance(core, cores.Softmax) and kwargs.get("bias") is None:
            checks.append(check_attention(output, query, key, value, scale=kwargs["scale"], kind="softmax"))
        else:  # what has no definition here is at least evaluated again in float64
            exact = core.forward(*(t.double() for t in (query, key, value)), **_in_float64(kwargs))
            error = _relative_error(output, exact)
            checks.append(Check(error, 64 * torch.finfo(query.dtype).eps, f"{type(core).__name__} in float64"))

    def compare_linear(layer: ShiftLinear, args: tuple[Tensor], output: Tensor) -> None:
        if output.numel():  # an expert may get no token
            rows, inputs = output.flatten(0, -2), args[0].flatten(0, -2)
            checks.append(check_linear(rows, inputs, layer.decoded_weight(), layer.bias, layer.activations))

    handles = [core.register_forward_hook(compare, with_kwargs=True) for core in named_cores(model).values()]
    layers = [module for module in model.modules() if isinstance(module, ShiftLinear)]
    handles += [layer.register_forward_hook(compare_linear) for layer in layers]
    try:
        output = without_grad(model)(images)
    finally:
        for handle in handles:
            handle.remove()
    if not bool(output.isfinite().all()):
        return Check(float("nan"), 0.0, "finite logits")
    worst = max(checks, key=lambda check: check.error / check.tolerance)
    return Check(
        worst.error, worst.tolerance, f"{worst.against}; worst of {len(checks)} attention cores and shift layers"
    )


def _in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def _relative_error(output: Tensor, exact: Tensor) -> float:
    return ((output.double() - exact).abs().max() / exact.abs().max()).item()


def check_against(run: Model, other: Model, tolerance: float, what: str) -> Callable[[Tensor], Check]:
    """Return a check that two models' outputs differ by at most `tolerance` of the largest; `what` is the other."""

    def check(images: Tensor) -> Check:
        return Check(_relative_error(without_grad(run)(images), without_grad(other)(images)), tolerance, what)

    return check


def without_grad(model: Model) -> Model:
    """Return the model, called without recording gradients."""

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images)

    return run
