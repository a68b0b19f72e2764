"""Whole models: the original against its conversion, eager and under torch.compile, on random images.

The original is checked against its own conversion with `recipes.softmax()`, which must be the identity; the converted
model by the float64 value of every attention core on the queries, keys and values that the model itself produces.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrify.bench.observe import core_multiplications, observe_cores
from vitrify.bench.reference import check_attention
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.roofline import Cost
from vitrify.convert import convert_, recipes
from vitrify.errors import InputError, unknown

# Importing from vitrify.models registers vitrify's own models with timm.
from vitrify.models.image_size import check_image_size
from vitrify.nn import cores
from vitrify.nn.attention import named_cores

LAYER_OPS = (".mm", ".addmm", ".convolution")
COMPILED_TOLERANCE = 1e-3
"""A compiled model reorders sums through all of its blocks: its output may differ by this much from eager's."""


def prepare(case: Case) -> Prepared:
    """Prepare a case: `model` (timm name), `image_size`, `batch_size`, `recipe` (name or path), `compile`, `device`.

    Raises:
        InputError: there is no such model, it cannot take such images, or the recipe changes nothing in it.
    """
    device = torch.device(case["device"])
    torch.manual_seed(0)
    size = int(case["image_size"])
    original = build(case["model"], size).to(device).eval().requires_grad_(False)
    shape = (_channels(original), size, size)
    converted, identity = copy.deepcopy(original), copy.deepcopy(original)
    conversion = convert_(converted, recipes.get(case["recipe"]), input_size=shape)
    if not conversion.changed:
        raise InputError(f"recipe {case['recipe']!r} changes nothing in {case['model']!r}:\n{conversion}")
    convert_(identity, recipes.softmax(), input_size=shape)

    def inputs(seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(int(case["batch_size"]), *shape, generator=generator, device=device)

    example = inputs(0)
    variants: list[tuple[str, nn.Module, Callable[[Tensor], Check]]] = [
        ("original", original, lambda images: check_identity(original, identity, images)),
        (case["recipe"], converted, lambda images: check_cores(converted, images)),
    ]
    contenders = []
    for name, model, check in variants:
        floor = cost(identity if model is original else model, example)
        contenders.append(Contender(name, _forward(model), check, floor))
        if case["compile"]:
            run = _forward(torch.compile(model, fullgraph=True, dynamic=False))
            contenders.append(Contender(f"{name} compiled", run, _check_compiled(run, model), floor))
    return Prepared(
        inputs=inputs,
        contenders=contenders,
        baselines={c.name: c.name.replace(case["recipe"], "original") for c in contenders},
        device=device,
        dtype=torch.float32,
        rotation=4,
    )


def build(name: str, image_size: int) -> nn.Module:
    """Build a registered model with random weights at `image_size` pixels; one without an `img_size` takes any size."""
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models())
    try:
        model: nn.Module = timm.create_model(name, img_size=image_size)
    except TypeError:  # PVT and LeViT have no such argument
        model = timm.create_model(name)
    check_image_size(model, image_size, "image_size")
    return model


def _channels(model: nn.Module) -> int:
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    return int(cfg["input_size"][0])


def cost(model: nn.Module, images: Tensor) -> Cost:
    """Count a converted model's products: linear layers and convolutions as run, attention from q, k, v's shapes.

    Bytes: every parameter once, the images and nothing else, as activations may stay in cache.
    """
    attention_flops = 0

    def count(core: cores.Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal attention_flops
        attention_flops += 2 * core_multiplications(core, args, kwargs)

    with observe_cores(model, count), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    kinds = counter.get_flop_counts()["Global"]
    # bmm and SDPA appear in attention only, which `count` has counted from its formula; value_convs are convolutions.
    layers = sum(flops for op, flops in kinds.items() if any(kind in str(op) for kind in LAYER_OPS))
    moved = sum(parameter.nbytes for parameter in model.parameters()) + images.nbytes
    return Cost(flops=layers + attention_flops, bytes_moved=moved)


def _forward(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return model(images)

    return run


def check_identity(original: nn.Module, identity: nn.Module, images: Tensor) -> Check:
    """Compare a model with its own conversion by the softmax recipe, which must change nothing."""
    own, other = _forward(original)(images), _forward(identity)(images)
    return Check(_relative_error(own, other), 1e-6, "its conversion with the softmax recipe")


def check_cores(model: nn.Module, images: Tensor) -> Check:
    """Compare every core's output with its float64 value, and return the worst; the model's output must be finite."""
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

    handles = [core.register_forward_hook(compare, with_kwargs=True) for core in named_cores(model).values()]
    try:
        output = _forward(model)(images)
    finally:
        for handle in handles:
            handle.remove()
    if not bool(output.isfinite().all()):
        return Check(float("nan"), 0.0, "finite logits")
    worst = max(checks, key=lambda check: check.error / check.tolerance)
    return Check(worst.error, worst.tolerance, f"{worst.against}; worst of {len(checks)} attention cores")


def _check_compiled(run: Callable[[Tensor], Tensor], eager: nn.Module) -> Callable[[Tensor], Check]:
    def check(images: Tensor) -> Check:
        return Check(_relative_error(run(images), _forward(eager)(images)), COMPILED_TOLERANCE, "the eager model")

    return check


def _in_float64(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}


def _relative_error(output: Tensor, exact: Tensor) -> float:
    return ((output.double() - exact).abs().max() / exact.abs().max()).item()
