"""What ShiftAddViT's energy saving consists of: five models, what became of each, every way to charge them.

    python experiments/energy/run.py           a few minutes on one core; writes results.json beside it
    python experiments/energy/report.py        the tables of README.md and energy.png, from results.json

Models have no weights: energy is a matter of shapes. Mixtures send 40 % of their tokens to multiplication, as
alpha 6 : 4 asks for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vitrify
from vitrify import AttentionSpec, LinearSpec, Recipe, Workload, recipes
from vitrify.bench.machine import describe
from vitrify.cost.energy import Energy
from vitrify.cost.split import Split

HERE = Path(__file__).parent

MODELS: dict[str, dict[str, Any]] = {
    "DeiT-T": {"name": "deit_tiny_patch16_224"},
    "DeiT-T, no class token": {"name": "deit_tiny_patch16_224", "class_token": False, "global_pool": "avg"},
    "PVTv1-T": {"name": "pvt_v1_tiny"},
    "PVTv2-B0": {"name": "pvt_v2_b0"},
    "PVTv2-B1": {"name": "pvt_v2_b1"},
    "PVTv2-B2": {"name": "pvt_v2_b2"},
}

SHIFTADDVIT = recipes.shiftaddvit()
# EcoFormer's: codes by kernelised hashing, one hash for queries and keys, linear layers that multiply. ShiftAddViT's
# authors start from the same: no spatial reduction, softmax over 49 tokens.
ECOFORMER = AttentionSpec("hamming", binariser="ksh", share_codes=True, form="taylor", reduction="remove", bias="drop")
# Four bits are what exact 8-bit sums take; a mixture's shift expert has float activations.
EIGHT_BIT_SHIFT = LinearSpec("shift", bits=4, activations="int8")
VARIANTS: dict[str, Recipe | None] = {
    "softmax": None,
    "softmax, reduction removed": Recipe("msa", AttentionSpec("softmax", reduction="remove")),
    "EcoFormer-style": Recipe("ecoformer", ECOFORMER, min_tokens=SHIFTADDVIT.min_tokens),
    "ShiftAddViT": SHIFTADDVIT,
    "ShiftAddViT, MLPs shift": replace(SHIFTADDVIT, mlp=LinearSpec("shift", bits=5)),
    "ShiftAddViT, 3 of 7 multiply": SHIFTADDVIT,
    "ShiftAddViT, MLPs shift, 8-bit activations": replace(
        SHIFTADDVIT, projections=EIGHT_BIT_SHIFT, mlp=EIGHT_BIT_SHIFT
    ),
    "vitrify": recipes.vitrify(),
    "softmax, INT8 linears": Recipe(
        "int8", projections=LinearSpec("integer", bits=8), mlp=LinearSpec("integer", bits=8)
    ),
}
# Numbers of tokens with many divisors: nothing is padded in the energy model, and 40 % often is a prime or nearly.
SPLITS = {"ShiftAddViT, 3 of 7 multiply": {"multiply": 3 / 7, "shift": 4 / 7}}


def main() -> None:
    """Measure everything and write results.json."""
    models = {}
    for title, arguments in MODELS.items():
        models[title] = {}
        for name, recipe in VARIANTS.items():
            found = models[title][name] = measure(built(arguments, recipe), SPLITS.get(name))
            print(title, name, {key: round(value["total_mj"], 2) for key, value in found["energy"].items()}, flush=True)
    result = {
        "command": "python experiments/energy/run.py",
        "machine": asdict(describe()),
        "img_size": 224,
        "batch_size": 1,
        "recipes": {name: None if recipe is None else recipe.to_dict() for name, recipe in VARIANTS.items()},
        "models": models,
    }
    (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")


def built(arguments: dict[str, Any], recipe: Recipe | None) -> nn.Module:
    """Return a model without weights, converted if there is a recipe."""
    with torch.device("meta"):
        model = vitrify.create_model(**arguments)
    if recipe is not None:
        vitrify.convert_(model, recipe)
    return model


def measure(model: nn.Module, split: dict[str, float] | None = None) -> dict[str, Any]:
    """Return the counts of one model, and its energy in mJ under every accounting."""
    graph = vitrify.workload(model, (3, 224, 224), split=split)
    published, real = vitrify.energy(graph, preset="as_published"), vitrify.energy(graph)
    return {
        "macs": graph.macs,
        **{primitive: graph.count(primitive) for primitive in ("multiply", "shift", "add")},
        "unknown": dict(graph.unknown),
        "energy": {
            "as_published": parts(published.total),
            "like_for_like": parts(real.total),
            "equal_32": parts(vitrify.energy(at_width(graph, 32)).total),
            "equal_8": parts(vitrify.energy(at_width(graph, 8)).total),
        },
        "vector_mj": real.vector_pj * 1e-9,
        # The same workload with one assumption of the published accounting taken back after another.
        "published_repaired": dict(repaired(published)),
        "contenders": {
            preset: {name: total(result, name) for name in result.compare[0].pj}
            for preset, result in (("as_published", published), ("like_for_like", real))
        },
    }


def at_width(graph: Workload, bits: int) -> Workload:
    """Return the workload with all operands of its products, codes too, `bits` wide, and sums of 32 bits.

    Only the primitive still tells its products apart. Element-wise work stays as it is.
    """
    operations = (
        operation
        if operation.kind == "vector"
        else replace(
            operation,
            bits=(bits, bits, 32),
            outputs=tuple(replace(operand, bits=bits) for operand in operation.outputs),
        )
        for operation in graph.operations
    )
    return replace(graph, operations=tuple(operations))


def repaired(published: Energy) -> Iterator[tuple[str, float]]:
    """Yield mJ of the published accounting with shift layers in 32 bits, and then with additions paying for memory."""
    own = {"multiply": "as built", "shift": "as built", "add": "as built"}
    for title, change in (("shift_in_32_bits", {"shift": "INT32 shift"}), ("and_add_pays", {"add": "INT32 add"})):
        own = {**own, **change}
        pj = 0.0
        for row in published.compare:
            (primitive,) = row.primitives
            pj += row.pj[own[primitive]]
        yield title, pj * 1e-9


def total(result: Energy, contender: str) -> float:
    """Return mJ of all products, made by that contender; element-wise work is not in it."""
    return sum(row.pj[contender] for row in result.compare) * 1e-9


def parts(split: Split) -> dict[str, float]:
    """Return the energy in mJ, and where it is spent."""
    return {
        "total_mj": split.total_pj * 1e-9,
        **{f"{name}_mj": value * 1e-9 for name, value in dataclasses.asdict(split).items()},
    }


if __name__ == "__main__":
    main()
