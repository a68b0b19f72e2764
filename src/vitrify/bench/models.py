"""Whole models: the original against its conversion, eager and under torch.compile, on random images.

The original is checked against its own conversion with `recipes.softmax()`, which must be the identity; the converted
model, its shift layers packed, by the float64 value of every attention core and shift layer on the inputs that the
model itself produces.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vitrify.bench import runtimes
from vitrify.bench.model_checks import check_against, check_identity, check_parts, without_grad
from vitrify.bench.observe import core_multiplications, observe_cores
from vitrify.bench.registry import Case, Check, Contender, Prepared
from vitrify.bench.roofline import NARROW, Cost
from vitrify.convert import convert_, pack_, recipes
from vitrify.errors import InputError, unknown

# Importing from vitrify.models registers vitrify's own models with timm.
from vitrify.models.image_size import check_image_size
from vitrify.nn import ShiftConv2d, ShiftLinear, cores

LAYER_OPS = (".mm", ".addmm", ".convolution")
COMPILED_TOLERANCE = 1e-3
"""A compiled model reorders sums through all of its blocks: its output may differ by this much from eager's."""
BFLOAT16_TOLERANCE = 0.1
INT8_TOLERANCE = 0.25
"""Rounded throughout, a model has other logits; these bounds find a wrong model, not a coarse one."""


def prepare(case: Case) -> Prepared:
    """Prepare a case: `model` (timm name), `image_size`, `batch_size`, `recipe` (name or path), `compile`, `device`.

    `runtimes` (bool): add bfloat16, and what else runs such a model on the device; see `vitrify.bench.runtimes`.

    Raises:
        InputError: there is no such model, it cannot take such images, or the recipe changes nothing in it.
    """
    device = torch.device(case["device"])
    torch.manual_seed(0)
    size = int(case["image_size"])
    original = build(case["model"], size).to(device).eval().requires_grad_(False)
    shape = (_channels(original), size, size)
    converted, identity = copy.deepcopy(original), copy.deepcopy(original)
    recipe = recipes.get(case["recipe"])
    conversion = convert_(converted, recipe, input_size=shape)
    if not conversion.changed:
        raise InputError(f"recipe {case['recipe']!r} changes nothing in {case['model']!r}:\n{conversion}")
    convert_(identity, recipes.softmax(), input_size=shape)

    def inputs(seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(int(case["batch_size"]), *shape, generator=generator, device=device)

    example = inputs(0)
    floors = {"original": cost(identity, example), recipe.name: cost(converted, example)}
    pack_(converted)
    checks: dict[str, Callable[[Tensor], Check]] = {
        "original": lambda images: check_identity(original, identity, images),
        recipe.name: lambda images: check_parts(converted, images),
    }
    contenders: list[Contender] = []
    for name, model in (("original", original), (recipe.name, converted)):
        contenders.append(Contender(name, without_grad(model), checks[name], floors[name]))
        if case["compile"]:
            # What rounds its activations turns the last bits of a norm into steps of 8 bits, and these into others.
            tolerance = INT8_TOLERANCE if floors[name].narrow else COMPILED_TOLERANCE
            contenders.append(_compiled(f"{name} compiled", model, floors[name], tolerance))
        if case["runtimes"]:
            contenders.extend(_in_bfloat16(name, model, floors[name], case["compile"]))
    baselines = {c.name: c.name.replace(recipe.name, "original") for c in contenders}
    not_run: dict[str, str] = {}
    if case["runtimes"]:
        others, not_run = runtimes.runtimes(original, example)
        for name, run in others.items():
            narrow = name in (runtimes.TORCH_INT8, runtimes.ORT_INT8)
            floor = cost(identity, example, as_int8=nn.Linear) if narrow else floors["original"]
            tolerance = INT8_TOLERANCE if narrow else COMPILED_TOLERANCE
            check = check_against(run, original, tolerance, "the original")
            contenders.append(Contender(name, without_grad(run), check, floor))
            baselines[name] = "original"
    return Prepared(
        inputs=inputs,
        # What a user waits for includes the launches; compiled models come with CUDA graphs of their own.
        contenders=[replace(contender, timed="call") for contender in contenders],
        baselines=baselines,
        device=device,
        dtype=torch.float32,
        rotation=4,
        not_run=not_run,
    )


def _compiled(name: str, model: nn.Module, floor: Cost, tolerance: float) -> Contender:
    # On a GPU with CUDA graphs: small models wait for launches otherwise.
    mode = "reduce-overhead" if next(model.parameters()).is_cuda else "default"
    run = without_grad(torch.compile(model, fullgraph=True, dynamic=False, mode=mode))
    return Contender(name, run, check_against(run, model, tolerance, "the eager model"), floor)


def _in_bfloat16(name: str, model: nn.Module, floor: Cost, compile: bool) -> Iterator[Contender]:
    halved = nn.Sequential(_Cast(), copy.deepcopy(model).to(torch.bfloat16))
    narrow = {"bfloat16": floor.flops - sum(floor.narrow.values()), **floor.narrow}
    floor = Cost(floor.flops, floor.bytes_moved // 2, narrow)
    check = check_against(halved, model, BFLOAT16_TOLERANCE, "the float32 model")
    yield Contender(f"{name} bfloat16", without_grad(halved), check, floor)
    if compile:
        yield _compiled(f"{name} bfloat16 compiled", halved, floor, BFLOAT16_TOLERANCE)


class _Cast(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.bfloat16)


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


def cost(model: nn.Module, images: Tensor, as_int8: type[nn.Module] | None = None) -> Cost:
    """Count a converted model's products: linear layers and convolutions as run, attention from q, k, v's shapes.

    Bytes: every parameter once, a shift layer's as its codes, the images and nothing else, as activations may stay in
    cache. Narrow products: those of shift layers by their activations, and of all layers of class `as_int8`.
    """
    attention_flops = 0
    narrow_flops: Counter[str] = Counter()

    def count(core: cores.Core, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal attention_flops
        attention_flops += 2 * core_multiplications(core, args, kwargs)

    def count_narrow(name: str, layer: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        narrow_flops[name] += 2 * output.numel() * layer.in_features

    handles = []
    for module in model.modules():
        name = "int8" if type(module) is as_int8 else NARROW.get(getattr(module, "activations", ""))
        if name == "int8" or (name is not None and images.is_cuda):
            handles.append(module.register_forward_hook(partial(count_narrow, name)))
    try:
        with observe_cores(model, count), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    kinds = counter.get_flop_counts()["Global"]
    # bmm and SDPA appear in attention only, which `count` has counted from its formula; value_convs are convolutions.
    layers = sum(flops for op, flops in kinds.items() if any(kind in str(op) for kind in LAYER_OPS))
    moved = sum(parameter.nbytes for parameter in model.parameters()) + images.nbytes
    for shift in (m for m in model.modules() if isinstance(m, (ShiftLinear, ShiftConv2d))):
        moved -= shift.weight.nbytes - shift.weight.numel() * shift.bits // 8
    return Cost(layers + attention_flops, moved, dict(narrow_flops))
