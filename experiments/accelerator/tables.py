"""Prints README's tables from results/*.json: python experiments/accelerator/tables.py"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
MODELS = {
    "deit_tiny_patch16_224": "DeiT-Tiny",
    "deit_small_patch16_224": "DeiT-Small",
    "deit_base_patch16_224": "DeiT-Base",
    "mobilevit_xxs": "MobileViT-xxs",
    "mobilevit_xs": "MobileViT-xs",
    "levit_128s": "LeViT-128s",
    "levit_128": "LeViT-128",
}


def rows(section: str) -> list[Row]:
    path = RESULTS / f"{section}.json"
    return json.loads(path.read_text()) if path.exists() else []


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
    header = list(header)
    print("|", " | ".join(header), "|")
    print("|", " | ".join("---" for _ in header), "|")
    for line in lines:
        print("|", " | ".join(line), "|")
    print()


_BUDGETS = {
    "area": "At equal area",
    "macs": "At equal PEs and clock",
    "own": "As they are",
    "clock": "Sanger's own 1,024 PEs at vitality's 500 MHz: as if they took the area of vitality's 4,160",
}


def claim() -> None:
    """Speed-up and energy ratio of vitality over each baseline, by budget."""
    found = {(r["key"]["model"], r["key"]["hardware"], r["key"]["budget"]): r for r in rows("claim")}
    baselines = ["sanger 0.08", "sanger 0.25", "sanger 0.5", "vitcod", "systolic", "vitality-affine"]
    for budget, words in _BUDGETS.items():
        print(f"**{words}**: time / energy / time of attention, as multiples of vitality's\n")
        lines = []
        for model, title in MODELS.items():
            ours = found.get((model, "vitality", "own"))
            cells = [title, f"{ours['ms']:.2f} ms, {ours['mj']:.2f} mJ" if ours else ""]
            for name in baselines:
                theirs = found.get((model, name, budget))
                cells.append(_ratios(theirs, ours) if theirs and ours else "")
            lines.append(cells)
        table(["model", "vitality", *baselines], lines)


def _ratios(theirs: Row, ours: Row) -> str:
    attention = theirs["attention_ms"] / ours["attention_ms"] if ours["attention_ms"] else float("nan")
    return f"{theirs['ms'] / ours['ms']:.2f} / {theirs['mj'] / ours['mj']:.2f} / {attention:.1f}"


def real_masks() -> None:
    found = {tuple(r["key"].values()): r for r in rows("real-masks")}
    ours = found.get(("vitality", "own"))
    lines = []
    for density in ("0.08", "0.15", "0.25", "0.5"):
        cells = [density]
        for budget in ("own", "area", "macs"):
            for source in ("captured", "synthetic"):
                theirs = found.get((f"sanger {density}", budget, source))
                cells.append(f"{theirs['ms'] / ours['ms']:.2f} / {theirs['mj'] / ours['mj']:.2f}" if theirs else "")
        lines.append(cells)
    heads = [f"{budget}, {source}" for budget in ("own", "area", "PEs") for source in ("captured", "synthetic")]
    table(["density", *heads], lines)


def ranges() -> None:
    grouped: dict[str, list[tuple[float, Row, Row]]] = {}
    found = {(r["key"]["place"], r["key"]["value"], r["key"]["hardware"]): r for r in rows("ranges")}
    for (place, value, hardware), ours in found.items():
        theirs = found.get((place, value, "sanger 0.25"))
        if hardware == "vitality" and theirs:
            grouped.setdefault(place, []).append((value, ours, theirs))
    lines = []
    for place, members in grouped.items():
        for value, ours, theirs in members:
            cells = [place, f"{value:g}", f"{ours['ms']:.2f}", f"{theirs['ms']:.2f}"]
            lines.append([*cells, f"{theirs['ms'] / ours['ms']:.2f}", f"{theirs['mj'] / ours['mj']:.2f}"])
    table(["figure", "value", "vitality, ms", "Sanger, ms", "speed-up", "energy"], lines)


def ablations() -> None:
    for model in ("deit_tiny_patch16_224", "deit_base_patch16_224"):
        found = {r["key"]["variant"]: r for r in rows("ablations") if r["key"]["model"] == model}
        base = found.get("as published")
        if base is None:
            continue
        print(f"**{MODELS[model]}**\n")
        lines = []
        for variant, row in found.items():
            if "ms" in row:
                attention = f"{row['attention_ms'] / base['attention_ms']:.2f}"
                cells = [variant, f"{row['ms']:.3f}", f"{row['ms'] / base['ms']:.3f}", attention]
                lines.append([*cells, f"{row['mj']:.2f}", f"{row['chip_mj']:.3f}", f"{row['mm2']:.2f}"])
        table(["variant", "ms", "of published", "attention", "mJ", "without DRAM", "mm2"], lines)
        steps = found.get("share of each step")
        if steps:
            total, energy = sum(steps["busy"].values()), sum(steps["pj"].values())
            order = sorted(steps["busy"], key=lambda name: -steps["busy"][name])[:14]
            cells = [
                [n, f"{100 * steps['busy'][n] / total:.1f}", f"{100 * steps['pj'][n] / energy:.1f}"] for n in order
            ]
            table(["layer or step", "% of engines' busy cycles", "% of energy"], cells)


def joined() -> None:
    for model in ("deit_tiny_patch16_224", "deit_base_patch16_224"):
        found = {r["key"]["design"]: r for r in rows("joined") if r["key"]["model"] == model}
        base = found.get("vitality")
        if base is None:
            continue
        print(f"**{MODELS[model]}**\n")
        lines = []
        for design, row in found.items():
            cells = [design, f"{row['ms']:.3f}", f"{base['ms'] / row['ms']:.2f}", f"{row['mj']:.2f}"]
            cells += [f"{base['mj'] / row['mj']:.2f}", f"{row['chip_mj']:.2f}", f"{row['weights_mj']:.2f}"]
            lines.append([*cells, f"{row['mm2']:.2f}"])
        header = [
            "design and recipe",
            "ms",
            "speed-up",
            "mJ",
            "energy saving",
            "without DRAM",
            "of DRAM: weights",
            "mm2",
        ]
        table(header, lines)


def scale() -> None:
    lines = []
    for row in rows("scale"):
        key = row["key"]
        cells = [str(key["tokens"]), str(key["batch"]), key["hardware"], f"{row['ms']:.2f}", f"{row['mj']:.2f}"]
        lines.append([*cells, f"{100 * row['dram_busy']:.0f} %", f"{100 * max(row['utilisation'].values()):.0f} %"])
    table(["tokens", "batch", "hardware", "ms", "mJ", "DRAM busy", "PEs busy"], lines)


def targets() -> None:
    found = {(r["key"]["model"], r["key"]["target"]): r["ms"] for r in rows("targets")}
    ours = {r["key"]["model"]: r["ms"] for r in rows("claim") if r["key"]["hardware"] == "vitality"}
    names = ("cpu", "jetson_tx2", "rtx3090", "h100")
    lines = [
        [title, *(f"{found[model, t]:.2f} ({found[model, t] / ours[model]:.1f}x)" for t in names)]
        for model, title in MODELS.items()
        if model in ours and all((model, t) in found for t in names)
    ]
    table(["model", *names], lines)


if __name__ == "__main__":
    for section in (claim, real_masks, ranges, ablations, joined, scale, targets):
        print(f"## {section.__name__}\n")
        section()
