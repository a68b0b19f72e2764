"""`explain`: which primitive would pay in which part of a model on a target, or that none would. How: LATENCY.md.

>>> import timm, torch, vitrify
>>> with torch.device("meta"):  # no weights are needed
...     model = timm.create_model("deit_tiny_patch16_224")
>>> found = vitrify.explain(model, (3, 224, 224), target="a100")
>>> found.advice.recipe is None, round(sum(row.time_share for row in found.rows), 6)
(True, 1.0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitrify.convert import Recipe
from vitrify.convert.tokens import check_input_size, default_input_size
from vitrify.cost import target_file
from vitrify.cost.explain.groups import GROUPS, Group, Layout
from vitrify.cost.explain.ledger import Cost, Ledger
from vitrify.cost.explain.risk import Progress, risks
from vitrify.cost.explain.sizes import Sizes, sizes
from vitrify.cost.explain.variants import (
    PRIMITIVES,
    ROLES,
    SPECS,
    Primitive,
    recipe_for,
    variant,
    variants,
)
from vitrify.cost.explain.words import verdict
from vitrify.cost.fusion import Fusion
from vitrify.cost.measured import Measurements
from vitrify.cost.tables import Entry
from vitrify.cost.target_file import Target
from vitrify.cost.workload import workload
from vitrify.errors import InputError

__all__ = ["Advice", "Explanation", "Row", "Saving", "explain"]


@dataclass(frozen=True)
class Saving:
    """What a primitive would save in one group, as parts of the whole model's time and energy; negative: it costs.

    energy   None for fp8, which has no workload of its own
    """

    time: float
    energy: float | None


@dataclass(frozen=True)
class Row:
    """One group of modules: its parts of the model's time and energy, and what each primitive would do there.

    risk   the output's mean cosine to the original's with this group converted alone, before any fine-tuning; empty
           unless images were given
    """

    group: Group
    time_share: float
    energy_share: float
    savings: Mapping[Primitive, Saving]
    risk: Mapping[Primitive, float]


@dataclass(frozen=True)
class Advice:
    """What to do.

    recipe            what to convert to, or None: do not convert
    saving            part of the time that the best recipe is computed to save; 0 if no group has a candidate
    measured_s        seconds of the model as it is, as `vitrify bench` measured them on this machine, or None
    saving_measured   part of the time that Taylor attention was measured to save there, or None
    """

    recipe: Recipe | None
    saving: float
    measured_s: float | None = None
    saving_measured: float | None = None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    seconds, energy_pj   of one forward pass as it is: computed on the target, and on Eyeriss at the same width
    rows                 the groups that take time, in the order in which they run
    sizes                what Taylor attention would save at other image sizes; None if the model takes only its own
    unknown              operators that no rule knows: charged for their bytes alone
    """

    model: str
    input_size: tuple[int, int, int]
    batch_size: int
    target: Target
    dtype: str
    fusion: Fusion
    seconds: float
    energy_pj: float
    rows: tuple[Row, ...]
    advice: Advice
    sizes: Sizes | None
    unknown: Mapping[str, int]

    @property
    def error(self) -> Entry:
        """The part of a model's time by which a computed saving may be off on this target, and how that is known."""
        return self.target["error.saving"]

    @property
    def verdict(self) -> str:
        """The advice in plain words."""
        return verdict(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        target = {"name": self.target.name, "title": self.target.title, "saving_error": asdict(self.error)}
        return {**asdict(self), "target": target, "verdict": self.verdict}


def explain(
    model: nn.Module,
    input_size: tuple[int, int, int] | None = None,
    batch_size: int = 1,
    *,
    target: str | Path | Target = "h100",
    dtype: str | None = None,
    fusion: Fusion | None = None,
    measured: str | Path | None = None,
    images: Tensor | None = None,
    progress: Progress = lambda message: None,
) -> Explanation:
    """Say which primitive would pay where in a model on a target, and recommend a recipe, or not to convert.

    model         any vision transformer; it is neither run nor changed, and may be on the "meta" device
    input_size    (channels, height, width); by default what the model was built for
    target, dtype, fusion   as in `vitrify.latency`
    measured      a folder of `vitrify bench` results, whose times take precedence
    images        (images, channels, height, width), prepared as the model expects: each group is converted alone, and
                  the output compared with the original's. Needs weights
    progress      called with a line of text before each step

    Raises InputError for an unknown target and an input size that the model refuses, UnsupportedError naming the module
    for a model that decides by the values of its tensors.
    """
    size = default_input_size(model) if input_size is None else check_input_size(input_size)
    if size is None:
        raise InputError(
            f"{type(model).__name__} does not say its image size: give input_size, (channels, height, width)"
        )
    machine = target if isinstance(target, Target) else target_file.load(target)
    dtype = machine.dtype if dtype is None else dtype
    progress("tracing")
    graph = workload(model, size, batch_size)
    ledger = Ledger.of(model, graph, size, batch_size, machine, dtype, fusion, measured)
    before = ledger.cost(ledger.graph)
    progress("trying each primitive")
    savings = _savings(ledger, before)
    risk = {} if images is None else risks(model, Layout.of(model), list(savings), images, size, progress)
    advice = _advise(ledger, before, savings, machine["error.saving"].value)
    if measured is not None:
        advice = _overruled(advice, Measurements.read(measured, machine), model, ledger, before)
    progress("looking for the break-even")
    return Explanation(
        model=graph.model,
        input_size=size,
        batch_size=batch_size,
        target=machine,
        dtype=before.latency.dtype,
        fusion=before.latency.fusion,
        seconds=before.seconds,
        energy_pj=before.energy_pj,
        rows=tuple(_row(group, before, savings, risk) for group in GROUPS if before.time[group]),
        advice=advice,
        sizes=_sizes(ledger, savings) if ledger.layout.attention else None,
        unknown=graph.unknown,
    )


def _row(
    group: Group,
    before: Cost,
    savings: Mapping[tuple[Group, Primitive], Saving],
    risk: Mapping[tuple[Group, Primitive], float],
) -> Row:
    return Row(
        group,
        time_share=before.time[group] / before.seconds,
        energy_share=before.energy[group] / (before.energy_pj or 1),
        savings={p: savings[group, p] for p in PRIMITIVES if (group, p) in savings},
        risk={p: risk[group, p] for p in PRIMITIVES if (group, p) in risk},
    )


def _savings(ledger: Ledger, before: Cost) -> dict[tuple[Group, Primitive], Saving]:
    found: dict[tuple[Group, Primitive], Saving] = {}
    machine = before.latency.target
    formats = [name for name in ("int8", "fp8") if f"peak.{name}" in machine]
    for tried in variants(ledger.part.model, ledger.layout, ledger.size, ledger.batch_size):
        kinds = set(tried.made.values())
        if kinds & {"int8", "shift8"} and not formats:
            continue  # the target has no 8-bit products
        for eight_bit in formats if "int8" in kinds else [_eight_bit(machine)]:
            cost = ledger.cost(tried.workload, eight_bit)
            for group, primitive in tried.made.items():
                name: Primitive = "fp8" if primitive == "int8" and eight_bit == "fp8" else primitive
                energy = (
                    None if name == "fp8" else (before.energy[group] - cost.energy[group]) / (before.energy_pj or 1)
                )
                found[group, name] = Saving((before.time[group] - cost.time[group]) / before.seconds, energy)
    return found


def _sizes(ledger: Ledger, savings: Mapping[tuple[Group, Primitive], Saving]) -> Sizes | None:
    own = savings["attention core", "taylor"].time if ("attention core", "taylor") in savings else 0.0
    return sizes(ledger.part.model, ledger.layout, ledger.size, ledger.batch_size, ledger.seconds, own)


def _eight_bit(machine: Target) -> str:
    """Return the format that shift layers' rounded activations have there: FP8 if it has that."""
    return "fp8" if "peak.fp8" in machine else "int8"


def _advise(ledger: Ledger, before: Cost, savings: Mapping[tuple[Group, Primitive], Saving], error: float) -> Advice:
    """Take for each group the primitive that saves most there, if that is more than the model's own error.

    What they save together must be so, too.
    """
    chosen: dict[Group, Primitive] = {}
    for group in ROLES:
        best = max((p for p in SPECS if (group, p) in savings), key=lambda p: savings[group, p].time, default=None)
        if best is not None and savings[group, best].time > error:
            chosen[group] = best
    found = variant(ledger.part.model, ledger.layout, chosen, ledger.size, ledger.batch_size) if chosen else None
    if found is None:
        return Advice(None, 0.0)
    eight_bit = _eight_bit(before.latency.target)
    saving = 1 - ledger.seconds(found.workload, eight_bit) / before.seconds
    return Advice(recipe_for("advised", chosen, eight_bit) if saving > error else None, saving)


def _overruled(advice: Advice, known: Measurements, model: nn.Module, ledger: Ledger, before: Cost) -> Advice:
    """Return the advice with what was measured of this model on this machine, which overrules what was computed.

    `vitrify bench models` times Taylor attention, so that is the advice that a measurement can speak about.
    """
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "")
    original, taylor = (
        known.model(
            architecture,
            image_size=ledger.size[1],
            batch_size=ledger.batch_size,
            recipe=recipe,
            dtype=before.latency.dtype,
            fusion=before.latency.fusion,
        )
        for recipe in ("original", "taylor")
    )
    if original is None:
        return advice
    advice = replace(advice, measured_s=original.seconds)
    only_taylor = advice.recipe is None or advice.recipe == recipe_for("advised", {"attention core": "taylor"})
    if taylor is None or not only_taylor:
        return advice
    recipe = recipe_for("advised", {"attention core": "taylor"}) if taylor.verdict == "faster" else None
    return replace(advice, recipe=recipe, saving_measured=1 - taylor.seconds / original.seconds)
