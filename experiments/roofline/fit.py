"""The free parameters of the roofline: least squares on the logarithms of the times, and how far the others are off."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import vitrify
from vitrify.cost import target_file
from vitrify.cost.fusion import Kernel, bytes_of, kernels
from vitrify.cost.latency import weights_of
from vitrify.cost.roofline import Roofline, product_kind

BASE = target_file.FOLDER / "cpu.yaml"
START = {f"efficiency.{name}": 0.7 for name in (*target_file.PRODUCTS, "vector", "memory", "cache")}
START |= {"efficiency.launch": 0.3, "decode.shift": 0.5, "decode.round": 0.5}
"""Where the search begins, and what the model says unfitted: 70 % of each peak; a call three times as long as the
probe's single addition; half a weight decoded, or an activation rounded, a nanosecond."""
NAMES = list(START)
LEVELS = ("memory", "cache")
PULL = 0.1
"""How strongly a parameter is held to its start: what no measurement speaks of stays there."""


def target(probe: Mapping[str, Any], values: Mapping[str, float]) -> target_file.Target:
    """Return the probed machine with these values of the free parameters."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.yaml"
        path.write_text(yaml.safe_dump(dict(probe)))
        machine = target_file.load(path)
    entries = dict(machine.entries)
    for key, value in values.items():
        like = entries[key] if key in entries else entries["vector.special"]  # in GOP/s, as the decode rates are
        entries[key] = replace(like, value=value)
    return replace(machine, entries=entries)


@dataclass(frozen=True)
class Terms:
    """A workload's kernels as what the free parameters scale: seconds at 1, by kernel; `Roofline.time`, taken apart.

    arithmetic   (kernels, parameters): each part is divided by its parameter, and the parts add up
    moved        (kernels, 2): from memory and from the cache, each divided by its efficiency; a kernel takes the larger
                 of arithmetic and bytes
    launch       (kernels): divided by efficiency.launch, and added
    """

    arithmetic: Any
    moved: Any
    launch: Any

    @classmethod
    def of(cls, workload: vitrify.Workload, probe: Mapping[str, Any]) -> Terms:
        weight_bytes = sum(bytes_of(operand, 32) for operand in weights_of(workload).values())
        ones = Roofline.of(target(probe, dict.fromkeys(START, 1.0)), "fp32", "int8", "eager", weight_bytes)
        found = kernels(workload, "eager")
        arithmetic = np.zeros((len(found), len(START)))
        for row, kernel in enumerate(found):
            for op in kernel.operations:
                vector = op.kind == "vector"
                decoded, rounded = ones.decode_s(op), ones.round_s(op)
                key = "efficiency.vector" if vector else f"efficiency.{product_kind(op)}"
                arithmetic[row, NAMES.index(key)] += ones.arithmetic_s(op) - decoded - rounded
                arithmetic[row, NAMES.index("decode.shift")] += decoded
                arithmetic[row, NAMES.index("decode.round")] += rounded
        moved = [[moved_s(ones, kernel, level) for level in LEVELS] for kernel in found]
        return cls(arithmetic, np.array(moved), np.array([ones.time(kernel).launch_s for kernel in found]))

    def seconds(self, values: Any) -> float:
        levels = values[[NAMES.index(f"efficiency.{level}") for level in LEVELS]]
        busy = np.maximum((self.arithmetic / values).sum(1), (self.moved / levels).sum(1))
        return float((busy + self.launch / values[NAMES.index("efficiency.launch")]).sum())


def moved_s(roofline: Roofline, kernel: Kernel, level: str) -> float:
    """Return the seconds of the bytes that a kernel moves to and from one level."""
    operands = (*kernel.reads, *kernel.writes)
    return sum(roofline.move_s(operand) for operand in operands if roofline.level_of(operand) == level)


def fit(rows: list[dict[str, Any]], terms: Mapping[Any, Terms]) -> dict[str, float]:
    """Return the free parameters that explain the measured times best, by Gauss-Newton on their logarithms."""
    start = np.log(list(START.values()))
    measured = np.log([milliseconds(row) * 1e-3 for row in rows])

    def computed(theta: Any) -> Any:
        return np.log([terms[row["model"], row["recipe"]].seconds(np.exp(theta)) for row in rows])

    # No efficiency is above 1; how fast codes are decoded has no such bound.
    ceiling = np.array([0.0 if name.startswith("efficiency") else np.inf for name in NAMES])
    theta, step = start.copy(), 1e-3
    for _ in range(50):
        now = computed(theta)
        slopes = np.stack([(computed(theta + step * unit) - now) / step for unit in np.eye(len(theta))], 1)
        matrix = np.vstack([slopes, PULL * np.eye(len(theta))])
        misses = np.concatenate([measured - now, PULL * (start - theta)])
        change = np.clip(np.linalg.lstsq(matrix, misses, rcond=None)[0], -0.3, 0.3)
        moved = np.minimum(theta + change, ceiling) - theta
        theta += moved
        if np.abs(moved).max() < 1e-3:
            break
    return dict(zip(NAMES, (float(f"{value:.3g}") for value in np.exp(theta)), strict=True))


def milliseconds(row: Mapping[str, Any]) -> float:
    """The least of the rounds: what the code takes when nothing disturbs it, which is what is computed."""
    return float(row["timing"]["min_ms"])


def judge(rows: list[dict[str, Any]], terms: Mapping[Any, Terms], values: Mapping[str, float]) -> dict[str, Any]:
    """Compare computed times with measured ones: errors of times and savings, and the order of each model's recipes."""
    times: dict[str, dict[str, tuple[float, float]]] = {}
    spread: dict[tuple[str, str], float] = {}
    for row in rows:
        spread[row["model"], row["recipe"]] = row["timing"]["median_ms"]
        computed = 1e3 * terms[row["model"], row["recipe"]].seconds(np.array(list(values.values())))
        times.setdefault(row["model"], {})[row["recipe"]] = milliseconds(row), computed
    errors = [abs(computed / measured - 1) for pairs in times.values() for measured, computed in pairs.values()]
    # (measured, computed) parts of the original's time
    savings = [
        (1 - pair[0] / pairs["original"][0], 1 - pair[1] / pairs["original"][1])
        for pairs in times.values()
        for recipe, pair in pairs.items()
        if recipe != "original"
    ]
    models = []
    for model, pairs in times.items():
        medians = {recipe: spread[model, recipe] for recipe in pairs}
        models.append({"model": model, "spearman": spearman(pairs), "wrong": wrong(pairs, medians), "ms": pairs})
    return {
        "time_error": statistics.median(errors),
        "time_error_max": max(errors),
        "saving_error": statistics.median(abs(computed - measured) for measured, computed in savings),
        # What the advisor goes by: how far a saving that it sees may be from the one there is.
        "saving_error_max": max(abs(computed - measured) for measured, computed in savings if computed > 0),
        "models": models,
    }


def wrong(pairs: Mapping[str, tuple[float, float]], medians: Mapping[str, float]) -> list[str]:
    """Return the pairs of recipes that are computed the other way round than they were measured.

    Two have an order only if the slower one's fastest call took longer than the faster one's median call.
    """
    found = []
    for (one, (a, computed_a)), (other, (b, computed_b)) in combinations(pairs.items(), 2):
        apart = a > medians[other] or b > medians[one]
        if apart and (a - b) * (computed_a - computed_b) < 0:
            found.append(f"{one} / {other}")
    return found


def spearman(pairs: Mapping[str, tuple[float, float]]) -> float:
    measured, computed = (np.argsort(np.argsort([pair[i] for pair in pairs.values()])) for i in range(2))
    return float(np.corrcoef(measured, computed)[0, 1])


def target_yaml(results: Mapping[str, Any]) -> str:
    """Return the target file "cpu": what the probe found, and what was fitted."""
    probed = results["probe"]
    sections = {name: dict(probed[name]) for name in ("peak", "vector", "bandwidth", "launch", "memory", "units")}
    sections["launch"]["compiled"] = {"value": 0.2, "unit": "us", "source": "call", "status": "assumed", "how": "call"}

    def fitted(value: float, how: str = "fit", unit: str = "ratio") -> dict[str, Any]:
        return {"value": float(f"{value:.3g}"), "unit": unit, "source": "experiment", "status": "fitted", "how": how}

    values = results["fitted"]
    sections["decode"] = {name: fitted(values[f"decode.{name}"], unit="GOP/s") for name in ("shift", "round")}
    sections["efficiency"] = {
        key.removeprefix("efficiency."): fitted(value) for key, value in values.items() if key.startswith("efficiency.")
    }
    judged = results["judged"]
    sections["error"] = {
        "time": fitted(judged["time_error"], "median"),
        "saving": fitted(judged["saving_error_max"], "largest"),
    }
    methods = {
        "call": "a fifth of an eager call: one compiled function calls the next; not measured",
        "fit": "least squares on the logarithms of the measured times of three models in seven forms",
        "median": "the median over three other models in seven forms",
        "largest": "the largest among what was computed to save time on three other models",
    }
    header = {
        "title": f"{results['machine']['cpu']}, {results['machine']['isa']}, one thread",
        "machine": probed["machine"],
        "dtype": "fp32",
        "fusion": "eager",
        "sources": {**probed["sources"], "experiment": f"experiments/roofline, {results['machine']['date']}"},
        "methods": methods,
    }
    text = yaml.safe_dump({**header, **sections}, sort_keys=False, default_flow_style=None, width=120)
    return f"# Written by experiments/roofline/run.py --update-target.\n{text}"
