"""What a GPU could reach at best, before one is at hand: `python benchmarks/predict.py` writes predicted-h100.md.

    python benchmarks/predict.py                 for an H100
    python benchmarks/predict.py --target a100   for another target of vitrify.cost

Operators get floors: the time for their least bytes at the data sheet's bandwidth or for their products at its rate,
whichever is longer; nothing is assumed about kernels. Models get the estimate of `vitrify.latency`, which assumes which
part of those rates kernels reach. Nothing here is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from runs import MODELS, TOKENS

import vitrify
from vitrify.bench import attention, hamming, mixture, models, shift
from vitrify.bench.roofline import Cost, Roofline
from vitrify.cost import target_file
from vitrify.cost.target_file import Target

HERE = Path(__file__).parent
DTYPE = "bfloat16"
BATCHES = (1, 32)
RECIPES = {"Taylor": "taylor", "Taylor, FP8 shift": str(HERE / "taylor_shift_float8.yaml")}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h100")
    target = target_file.load(parser.parse_args().target)
    limits = roofline(target)
    tables = {
        "Attention, forward": attention_table(limits, backward=False),
        "Attention, forward and backward": attention_table(limits, backward=True),
        "Shift layers, fc1 of ViT-B (768 to 3,072)": shift_table(limits),
        "Attention among codes, the shapes of ShiftAddViT's kernel benchmark": hamming_table(limits),
        "Mixtures, fc1 of ViT-B, 40 % of the tokens multiply": mixture_table(limits),
        "Models, ms per batch, bf16, estimated": model_table(target),
    }
    text = [
        f"# Predicted, not measured: {target.title}\n",
        f"Written by `python benchmarks/predict.py --target {target.name}` from data sheets (`vitrify.cost`): "
        f"{limits.bandwidth_gb_s:,.0f} GB/s, {limits.peak_gflop_s / 1e3:,.0f} TFLOP/s in {DTYPE}. In brackets, how "
        "many times shorter than the first column. **Operators**: floors in us, the time for the least bytes or the "
        f"products, whichever is longer; a launch takes about {1e6 * target.si('launch.compiled'):.0f} us more. "
        "**Models**: estimates of `vitrify.latency`, launches included, in which the part of those rates that kernels "
        "reach is assumed.\n",
    ]
    for title, lines in tables.items():
        text += [f"## {title}\n", *lines, ""]
    (HERE / f"predicted-{target.name}.md").write_text("\n".join(text))
    print("\n".join(text))


def roofline(target: Target) -> Roofline:
    """Return the data sheet's limits, in the units of `vitrify bench`."""
    narrow = {"int8": "int8", "float8_e4m3fn": "fp8"}
    return Roofline(
        target.si("bandwidth.memory") / 1e9,
        target.si("peak.bf16") / 1e9,
        DTYPE,
        {name: target.si(f"peak.{kind}") / 1e9 for name, kind in narrow.items() if f"peak.{kind}" in target},
    )


def table(head: Iterable[str], rows: Iterable[tuple[str, dict[str, float]]]) -> Iterator[str]:
    """Yield a Markdown table: what, then each contender's floor and how many times shorter than the first it is."""
    for number, (what, floors) in enumerate(rows):
        if number == 0:
            yield f"| {' | '.join([*head, *floors])} |"
            yield "|" + "---|" * (len(list(head)) + len(floors))
        first = next(iter(floors.values()))
        cells = [
            f"{value:,.3g} ({first / value:.2f}x)" if i else f"{value:,.3g}" for i, value in enumerate(floors.values())
        ]
        yield f"| {what} | {' | '.join(cells)} |"


def floors(limits: Roofline, costs: dict[str, Cost]) -> dict[str, float]:
    """Return the contenders' floors in us; those in a format that the target does not multiply are left out."""
    return {
        name: 1e3 * limits.floor_ms(cost)
        for name, cost in costs.items()
        if cost.narrow.keys() <= limits.narrow_gflop_s.keys()
    }


def attention_table(limits: Roofline, *, backward: bool) -> list[str]:
    """SDPA against Taylor attention, batch 1."""
    rows = []
    for heads in (6, 12, 16):
        for tokens in map(int, TOKENS.split()[1].split(",")):
            case = {
                "batch_size": 1,
                "tokens": tokens,
                "heads": heads,
                "head_dim": 64,
                "dtype": DTYPE,
                "backward": backward,
            }
            costs = {"SDPA": attention.cost("softmax", case), "Taylor": attention.cost("taylor", case)}
            rows.append((f"{heads} | {tokens:,}", floors(limits, costs)))
    return list(table(["heads", "tokens"], rows))


def shift_table(limits: Roofline) -> list[str]:
    """A bf16 layer against 4-bit codes by each format of the activations."""
    rows = []
    for count in shift.ROWS:
        case: dict[str, Any] = {"rows": count, "inputs": 768, "outputs": 3072, "dtype": DTYPE}
        costs = {"F.linear": shift.cost("float", 16, case)}
        costs |= {f"shift {kind}": shift.cost(kind, shift.BITS, case) for kind in ("float", "int8", "float8")}
        rows.append((f"{count:,}", floors(limits, costs)))
    return list(table(["rows"], rows))


def hamming_table(limits: Roofline) -> list[str]:
    """The products of codes against each form that they are kept in."""
    rows = []
    for shape in hamming.SHAPES:
        case = {**dict(zip(hamming.SIZES, shape, strict=True)), "dtype": DTYPE}
        rows.append((f"{shape[1]} | {shape[2]:,}", floors(limits, hamming.costs(case))))
    return list(table(["heads", "tokens"], rows))


def mixture_table(limits: Roofline) -> list[str]:
    """The layer before conversion against ways to run a mixture."""
    rows = []
    for count in shift.ROWS:
        case: dict[str, Any] = {"rows": count, "inputs": 768, "outputs": 3072, "multiply": 0.4, "dtype": DTYPE}
        names = (mixture.MULTIPLY, mixture.MIXTURE, *mixture.ROUNDED, mixture.DENSE)
        rows.append((f"{count:,}", floors(limits, {name: mixture.cost(name, case) for name in names})))
    return list(table(["rows"], rows))


def model_table(target: Target) -> list[str]:
    """Each model of `runs.py`: original, and converted."""
    rows = []
    for name, size in MODELS:
        forms = {"original": models.build(name, size).eval()}
        for title, recipe in RECIPES.items():
            forms[title] = models.build(name, size).eval()
            vitrify.convert_(forms[title], vitrify.recipes.get(recipe), input_size=(3, size, size))
        for batch in BATCHES:
            found = {}
            for title, model in forms.items():
                work = vitrify.workload(model, (3, size, size), batch)
                found[title] = 1e3 * vitrify.latency(work, target, eight_bit="fp8").seconds
            rows.append((f"{name}, {size} px | {batch}", found))
    return list(table(["model", "batch"], rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
