"""Does ViTALiTy's accelerator reach three times Sanger's speed and efficiency, and what does joining the papers bring?

    python experiments/accelerator/run.py            # every section, about 20 minutes on one core
    python experiments/accelerator/run.py claim      # one of SECTIONS: claim, real-masks, ranges, ablations, ...

Sections write results/SECTION.json line by line: what is in it is not run again. tables.py makes README's tables of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
from designs import DESIGNS, RANGES, RECIPES, SANGER_SHAPES
from torch import nn

import vitrify
from vitrify.accelerator.budget import matched
from vitrify.accelerator.hardware import Hardware, describe, load
from vitrify.accelerator.masks import Masks, synthetic_for
from vitrify.accelerator.prices import Prices
from vitrify.accelerator.result import Result
from vitrify.accelerator.simulate import candidates, simulate
from vitrify.cost.workload import Workload
from vitrify.files import write_atomically

HERE = Path(__file__).parent
MODELS = {
    "deit_tiny_patch16_224": 224,
    "deit_small_patch16_224": 224,
    "mobilevit_xxs": 256,
    "mobilevit_xs": 256,
    "levit_128s": 224,
    "levit_128": 224,
    "deit_base_patch16_224": 224,
}
TINY = "deit_tiny_patch16_224"
SIDES = ("rows", "columns")
DENSITIES = (0.08, 0.15, 0.25, 0.5)
Row = dict[str, Any]


@cache
def model(name: str, recipe: str = "softmax", size: int | None = None) -> nn.Module:
    made = timm.create_model(name, **({"img_size": size} if size else {}))
    if recipe != "softmax":
        vitrify.convert_(made, RECIPES[recipe]())
    return made


@cache
def workload(name: str, recipe: str = "softmax", size: int = 224, batch: int = 1) -> Workload:
    # In the paper's own form where the paper's hardware runs it; every other hardware takes the affine form.
    form = "algorithm1" if recipe == "vitality" else "affine"
    split = {"multiply": 0.4, "shift": 0.6} if "mixture" in recipe or recipe in ("shiftaddvit", "vitrify") else None
    source = "vitality" if recipe == "affine" else recipe
    made = model(name, source, size if name.startswith("deit") and size != 224 else None)
    return vitrify.workload(made, (3, size, size), batch, taylor=form, split=split)


def measure(graph: Workload, hardware: Hardware, masks: Masks | None = None, **options: Any) -> Row:
    """Simulate with the mapping of the least energy-delay product, so that both figures are of the same run.

    Of tiles of at least 16 KiB, on whole arrays: smaller ones never had the least, and take most of the time.
    """
    mappings = [mapping for mapping in candidates(hardware) if mapping.limit is None and mapping.tile_kib >= 16]
    result = simulate(graph, hardware, masks=masks, objective="edp", mappings=mappings, **options)
    return figures(result)


def figures(result: Result) -> Row:
    weights = sum(  # bits of weights that come from the DRAM once, at the widths of the hardware
        operand_bits(result, index) for index in range(len(result.placements))
    )
    dram = result.energy_pj["dram"]
    moved = result.bits["dram read"] + result.bits.get("dram write", 0.0)
    return {
        "cycles": result.cycles,
        "ms": result.seconds * 1e3,
        "attention_ms": result.attention_cycles / result.hardware.clock_mhz * 1e-3,
        "mj": result.total_pj * 1e-9,
        "chip_mj": (result.total_pj - dram) * 1e-9,
        "weights_mj": dram * weights / moved * 1e-9,
        "mm2": result.total_mm2,
        "arrays": {name: [array.rows, array.columns] for name, array in result.hardware.arrays.items()},
        "utilisation": {name: result.utilisation[name] for name in result.hardware.arrays if name in result.queues},
        "dram_busy": result.queues["dram"].busy / result.cycles,
        "tile_kib": result.mapping.tile_kib,
        "notes": list(result.notes),
    }


def operand_bits(result: Result, index: int) -> float:
    operation = result.placements[index].operation
    limit = result.hardware.numbers.weight_bits
    return sum(
        min(operand.bits, limit) * _size(operand.shape) for operand in operation.inputs if operand.kind == "weight"
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def budgets(name: str) -> Iterator[tuple[str, Hardware]]:
    """Give a preset as it is, with its PEs at vitality's clock, and with vitality's area and PEs."""
    own, reference = load(name), load("vitality")
    yield "own", own
    if name != "vitality":
        if own.clock_mhz != reference.clock_mhz:
            yield "clock", own.with_({"clock_mhz": reference.clock_mhz})
        yield "area", sanger_in(reference) if name == "sanger" else matched(own, reference, "area")
        yield "macs", matched(own, reference, "macs")


_SANGERS: dict[str, Hardware] = {}


def sanger_in(reference: Hardware, lanes: float | None = None) -> Hardware:
    """Return the fastest Sanger on DeiT-Tiny, at density 0.25, that fits into the area of `reference`."""
    key = json.dumps([describe(reference), lanes])
    if key not in _SANGERS:
        _SANGERS[key] = _fastest_sanger(reference, lanes)
    return _SANGERS[key]


def _fastest_sanger(reference: Hardware, lanes: float | None) -> Hardware:
    area = sum(Prices(reference).areas().values())
    fitting = []
    for shape in SANGER_SHAPES:
        sides = {f"engines.{name}.{side}": n for name, at in shape.items() for side, n in zip(SIDES, at, strict=True)}
        changed = load("sanger").with_({**sides, **({"engines.special.lanes": lanes} if lanes else {})})
        machine = replace(
            changed,
            clock_mhz=reference.clock_mhz,
            numbers=reference.numbers,
            sram_kib=reference.sram_kib,
            dram=reference.dram,
        )
        if sum(Prices(machine).areas().values()) <= area:
            fitting.append(machine)
    return min(fitting, key=lambda machine: _sparse(TINY, 224, machine, 0.25)["ms"])


def claim() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give every model on every preset. Masks are synthetic: no ImageNet weights can be had here."""
    for name, size in MODELS.items():
        for hardware in ("vitality", "vitality-affine", "systolic", "vitcod"):
            recipe = {"vitality": "vitality", "vitality-affine": "affine"}.get(hardware, "softmax")
            for budget, machine in budgets(hardware):
                key = {"model": name, "hardware": hardware, "budget": budget}
                yield key, lambda m=machine, r=recipe, n=name, s=size: measure(workload(n, r, s), m)
        for density in DENSITIES:
            for budget, machine in budgets("sanger"):
                key = {"model": name, "hardware": f"sanger {density:g}", "budget": budget}
                yield key, lambda m=machine, n=name, s=size, d=density: _sparse(n, s, m, d)


def _sparse(name: str, size: int, machine: Hardware, density: float) -> Row:
    graph = workload(name, "softmax", size)
    keys = min(operation.n for operation in graph.operations if operation.step == "qk" and operation.macs)
    return measure(graph, machine, synthetic_for(graph, max(density, 1 / keys)))


def real_masks() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give the shipped ViT, whose masks are captured from its own attention on real images."""
    import torch  # noqa: PLC0415

    from vitrify.accelerator.capture import capture_masks  # noqa: PLC0415
    from vitrify.data import build_transform, load_dataset  # noqa: PLC0415

    softmax = vitrify.create_model("vit_mini_patch2_28", pretrained=True)
    taylor = vitrify.create_model("vit_mini_patch2_28", pretrained=True)
    vitrify.convert_(taylor, vitrify.recipes.vitality())
    config = timm.data.resolve_model_data_config(softmax)
    transform = build_transform(config["input_size"], config["mean"], config["std"], train=False)
    dataset = load_dataset("fashion-mnist", "test", transform=transform)
    images = torch.stack([dataset[index][0] for index in range(16)])
    graph = vitrify.workload(softmax, (1, 28, 28))
    for density in DENSITIES:
        for budget, machine in budgets("sanger"):
            for source in ("captured", "synthetic"):
                key = {"hardware": f"sanger {density:g}", "budget": budget, "masks": source}

                def row(m: Hardware = machine, d: float = density, s: str = source) -> Row:
                    masks = capture_masks(softmax, images, density=d) if s == "captured" else synthetic_for(graph, d)
                    return measure(graph, m, masks)

                yield key, row
    algorithm1 = vitrify.workload(taylor, (1, 28, 28), taylor="algorithm1")
    yield {"hardware": "vitality", "budget": "own"}, lambda: measure(algorithm1, load("vitality"))


def ranges() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give vitality, and Sanger with its area, over the range of every recalled or assumed constant of both."""
    for place, values in RANGES.items():
        for value in values:
            ours = load("vitality").with_({place: value})
            theirs = sanger_in(ours, value if place.startswith("engines.special") else None)
            key = {"place": place, "value": value}
            yield {**key, "hardware": "vitality"}, lambda m=ours: measure(workload(TINY, "vitality"), m)
            yield {**key, "hardware": "sanger 0.25"}, lambda m=theirs: _sparse(TINY, 224, m, 0.25)


def ablations() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give the paper's design choices, each changed alone."""
    keeps = {"engines.general.in_place": True, "engines.general.dataflows": ["output", "weight"]}
    for name in (TINY, "deit_base_patch16_224"):
        graph = workload(name, "vitality")
        variants: dict[str, Callable[[], Row]] = {
            "as published": lambda g=graph: measure(g, load("vitality")),
            "no intra-layer pipeline": lambda g=graph: measure(g, load("vitality"), pipeline=False),
            "any dataflow": lambda g=graph: measure(
                g, load("vitality").with_({"engines.general.dataflows": ["output", "weight", "input"]})
            ),
            "G-stationary": lambda g=graph: measure(g, load("vitality").with_(keeps), schedule="g-stationary"),
            "affine form": lambda n=name: measure(workload(n, "affine"), load("vitality-affine")),
            "affine form on a plain array (`systolic`)": lambda n=name: measure(
                workload(n, "affine"), load("systolic")
            ),
            "softmax on a plain array (`systolic`)": lambda n=name: measure(workload(n), load("systolic")),
        }
        for variant, row in variants.items():
            yield {"model": name, "variant": variant}, row
        yield {"model": name, "variant": "share of each step"}, lambda g=graph: _steps(g)


def _steps(graph: Workload) -> Row:
    result = simulate(graph, "vitality")
    busy: dict[str, int] = {}
    energy: dict[str, float] = {}
    for cost in result.operations:
        group = f"step {cost.step}" if cost.step else cost.module.split(".")[-1] or "model"
        busy[group] = busy.get(group, 0) + cost.busy
        energy[group] = energy.get(group, 0.0) + cost.pj
    return {"cycles": result.cycles, "busy": busy, "pj": energy}


def joined() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give recipes of both papers on designs of at most vitality's area."""
    for name in (TINY, "deit_base_patch16_224"):
        for title, (recipe, hardware) in DESIGNS.items():

            def row(n: str = name, r: str = recipe, h: str = hardware) -> Row:
                machine = load(h)
                if h == "shiftadd":
                    machine = matched(machine, load("vitality"), "area")
                return measure(workload(n, r), machine)

            yield {"model": name, "design": title}, row


def scale() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give tokens from 197 to 16,385, and batches from 1 to 16, of DeiT-Tiny."""
    for size in (224, 384, 512, 1024, 2048):
        for hardware, recipe in (("vitality", "vitality"), ("vitality-affine", "affine"), ("systolic", "softmax")):
            key = {"tokens": (size // 16) ** 2 + 1, "batch": 1, "hardware": hardware}
            yield key, lambda s=size, r=recipe, h=hardware: measure(workload(TINY, r, s), load(h))
    for batch in (2, 4, 8, 16):
        for hardware, recipe in (("vitality", "vitality"), ("systolic", "softmax")):
            key = {"tokens": 197, "batch": batch, "hardware": hardware}
            yield key, lambda b=batch, r=recipe, h=hardware: measure(workload(TINY, r, 224, b), load(h))


def targets() -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give the rooflines of general machines: the original model at its usual precision there."""
    for name, size in MODELS.items():
        for target in ("cpu", "jetson_tx2", "rtx3090", "h100"):

            def row(n: str = name, s: int = size, t: str = target) -> Row:
                return {"ms": vitrify.latency(workload(n, "softmax", s), t).seconds * 1e3}

            yield {"model": name, "target": target}, row


SECTIONS = {
    "claim": claim,
    "real-masks": real_masks,
    "ranges": ranges,
    "ablations": ablations,
    "joined": joined,
    "scale": scale,
    "targets": targets,
}


def run(section: str) -> None:
    path = HERE / "results" / f"{section}.json"
    rows: list[Row] = json.loads(path.read_text()) if path.exists() else []
    done = {json.dumps(row["key"], sort_keys=True) for row in rows}
    for key, make in SECTIONS[section]():
        if json.dumps(key, sort_keys=True) in done:
            continue
        rows.append({"key": key, **make()})
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())
        print(section, key, f"{rows[-1].get('ms', 0):.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    sections = parser.parse_args().sections or list(SECTIONS)
    for section in sections:
        if section not in SECTIONS:
            parser.error(f"no section {section!r}: there are {', '.join(SECTIONS)}")
        run(section)


if __name__ == "__main__":
    main()
