"""Calibrated rounding: shift weights chosen by the error of a layer's output on a few images, not weight by weight.

A row that changes by dw changes the output by dw H dw^T, with H the second moment of the layer's inputs. Columns are
rounded one after the other, each to the nearer level, and what that leaves is made good by the columns still to come
(the update of optimal brain surgeon, ordered as in GPTQ). Inputs are correlated, so there is much to make good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.nn.modes import evaluating
from vitrify.nn.shift import ShiftLinear
from vitrify.ops.shift import reference

# Added to H's diagonal, in units of its mean: few images leave H singular.
DAMPING = 0.01
# Columns whose corrections are collected before they reach the rest in one product: bound by arithmetic, not memory.
BLOCK = 64
# Around round(log2 max|row|): one lower gives up the largest weights for finer small ones, one higher leaves room for
# corrections.
EXPONENT_STEPS = (-1, 0, 1)


@torch.no_grad()
def calibrate_shift_(model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[float, float]]:
    """Round every ShiftLinear of `model` by output error, in place: the latent weights become the decoded ones.

    batches: a few inputs of the model, each a Tensor, a tuple of arguments or a dict of keyword arguments. The model
    runs once over them in eval mode, all its shift layers rounded as usual, to take every layer's input statistics:
    in^2 float32 numbers per layer.
    Returns {layer name: (error before, error after)}: the relative error of the layer's output on `batches`, bias
    aside, against the latent weight it had. After is never above before. Layers that got no token are left alone and
    not listed; so are shift convolutions.

    Raises InputError if the model has no ShiftLinear, one is packed, `batches` is empty, or an input is not finite.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ShiftLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no ShiftLinear to calibrate: convert its linear layers first")
    for name, layer in layers.items():
        if layer.packed:
            raise InputError(f"{name or 'the layer'} is packed, its latent weight gone: calibrate before pack_()")
    moments: dict[str, Tensor] = {}
    with _observed(layers, moments), evaluating(model):
        for batch in batches:
            _call(model, batch)
    if not moments:
        raise InputError("batches is empty, or no ShiftLinear saw a token: give a few inputs of the model")
    errors = {}
    for name, moment in moments.items():
        if not moment.isfinite().all():
            raise InputError(f"the inputs of {name or 'the layer'} hold NaN or inf on these batches")
        errors[name] = _calibrate(layers[name], moment)
    return errors


def _calibrate(layer: ShiftLinear, moment: Tensor) -> tuple[float, float]:
    moment = moment.double()
    latent = layer.weight.detach().double()
    plain = layer.decoded_weight().double()
    default = reference.default_exponent(layer.weight, layer.bits, layer.variant)
    limits = reference.exponent_limits(layer.weight.dtype, layer.bits, layer.variant)
    exponents = torch.cat([(default + step).clamp(*limits) for step in EXPONENT_STEPS])
    rounded = _round_columns(latent.repeat(len(EXPONENT_STEPS), 1), exponents, _inverse_factor(moment), layer)
    candidates = torch.stack([plain, *rounded.chunk(len(EXPONENT_STEPS))])
    difference = candidates - latent
    errors = ((difference @ moment) * difference).sum(-1)
    best = errors.argmin(0)
    layer.weight.copy_(candidates[best, torch.arange(len(best), device=best.device)])
    total = ((latent @ moment) * latent).sum()
    before, after = (errors[0].sum(), errors.amin(0).sum())
    return _relative(before, total), _relative(after, total)


def _relative(error: Tensor, total: Tensor) -> float:
    return (error.clamp(min=0) / total).sqrt().item() if total > 0 else 0.0


def _inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = (H + damping)^-1: row j says how later columns make good column j."""
    diagonal = moment.diagonal().clone()
    damped = moment + torch.diag(DAMPING * diagonal.mean() + (diagonal == 0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def _round_columns(weight: Tensor, exponent: Tensor, factor: Tensor, layer: ShiftLinear) -> Tensor:
    """Return `weight` (rows, in), which is overwritten, rounded column by column with error feedback."""
    top, lowest = reference.top_level(layer.bits), reference.lowest_level(layer.variant)
    high = reference.power_of_two(exponent).to(weight.dtype)
    low = reference.power_of_two(exponent - top + lowest).to(weight.dtype)
    out = torch.empty_like(weight)
    width = weight.shape[1]
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        block, rows = weight[:, start:end], factor[start:end]
        left = torch.empty_like(block)
        for j in range(end - start):
            column = block[:, j]
            rounded = _nearest(column, low, high, layer.variant)
            out[:, start + j] = rounded
            left[:, j] = (column - rounded) / rows[j, start + j]
            block[:, j + 1 :] -= left[:, j, None] * rows[j, start + j + 1 : end]
        weight[:, end:] -= left @ rows[:, end:]
    return out


def _nearest(x: Tensor, low: Tensor, high: Tensor, variant: str) -> Tensor:
    """Return the nearest level, by distance and not by log2: it is the distance that the output sees."""
    power = reference.nearest_power(x.abs().clamp(low, high), reference.LINEAR_HALF_WAY)
    value = reference.power_of_two(power).to(x.dtype).copysign(x)
    return value.masked_fill(x.abs() < low / 2, 0) if variant == "ps" else value


@contextmanager
def _observed(layers: Mapping[str, ShiftLinear], moments: dict[str, Tensor]) -> Iterator[None]:
    """Add up X^T X of every layer's inputs into `moments` while the context lasts."""

    def add(module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
        tokens = args[0].detach().flatten(0, -2)
        if len(tokens):
            tokens = reference.wide(tokens)
            moment = tokens.T @ tokens
            moments[name] = moments[name] + moment if name in moments else moment

    handles = [layer.register_forward_pre_hook(partial(add, name=name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
