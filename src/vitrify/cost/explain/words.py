"""The advisor's sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitrify.cost.explain.advisor import Explanation

_REPLACED = {"taylor": "Taylor attention", "hamming": "additive attention"}


def verdict(found: Explanation) -> str:
    """Return the advice: what attention is worth here and elsewhere, then what to do, then how sure that is."""
    return " ".join(filter(None, [_attention(found), _advice(found), _eight_bits(found), _confidence(found)]))


def _attention(found: Explanation) -> str:
    row = next((row for row in found.rows if row.group == "attention core"), None)
    if row is None:
        return "This model has no attention."
    share = f"{percent(row.time_share)} of this model's time on {found.target.name}"
    where = f"At {found.input_size[1]} px the attention core is {share}"
    if "taylor" not in row.savings:
        return f"{where}; no recipe makes it linear here." + _other_sizes(found, pays=False)
    saving = row.savings["taylor"].time
    if saving > found.error.value:
        return f"{where}: Taylor attention would save {percent(saving)}." + _other_sizes(found, pays=True)
    effect = f"cost {percent(-saving)}" if saving < 0 else f"save {percent(saving)}"
    return f"{where}: Taylor attention will not pay ({effect})." + _other_sizes(found, pays=False)


def _other_sizes(found: Explanation, *, pays: bool) -> str:
    if found.sizes is None:
        return ""
    if found.sizes.break_even is None:
        return f" It does not at any size up to {max(found.sizes.savings)} px."
    larger = [side for side in found.sizes.savings if side > found.input_size[1] and found.sizes.savings[side] > 0]
    then = f"; at {min(larger, key=_from_1024)} px it would save " if larger and not pays else ""
    if then:
        then += percent(found.sizes.savings[min(larger, key=_from_1024)])
    return f" It is faster from {found.sizes.break_even} px on{then}."


def _from_1024(side: int) -> int:
    return abs(side - 1024)


def _advice(found: Explanation) -> str:
    advice = found.advice
    saving = advice.saving if advice.saving_measured is None else advice.saving_measured
    source = "computed" if advice.saving_measured is None else "measured on this machine"
    if advice.recipe is None:
        if advice.saving_measured is not None:
            effect = f"saves {percent(saving)}" if saving > 0 else f"costs {percent(-saving)}"
            return f"Do not convert: Taylor attention {effect} ({source})."
        return "Do not convert: no primitive is computed to save more than computed savings may be off."
    return f"Convert: {_summary(found)} saves {percent(saving)} of the time ({source})."


def _summary(found: Explanation) -> str:
    recipe = found.advice.recipe
    assert recipe is not None
    parts = [_REPLACED[recipe.attention.core]] if recipe.attention.core in _REPLACED else []
    for role in ("projections", "mlp"):
        primitive = getattr(recipe, role).primitive
        if primitive != "multiply":
            eight = " on 8-bit activations" if getattr(recipe, role).activations != "float" else ""
            parts.append(f"{role}: {primitive}{eight}")
    return ", ".join(parts)


def _eight_bits(found: Explanation) -> str:
    """Name 8-bit multiplication where it beats the recipes' own primitives for linear layers."""
    best: dict[str, float] = {}
    for row in found.rows:
        for primitive, saving in row.savings.items():
            best[primitive] = best.get(primitive, 0.0) + saving.time
    shift = max((best[name] for name in ("shift", "shift8") if name in best), default=0.0)
    ours = max(shift, best.get("mixture", 0.0), 0.0)
    rivals = [name for name in ("fp8", "int8") if best.get(name, 0.0) > max(ours, found.error.value)]
    if not rivals:
        return ""
    rival = max(rivals, key=lambda name: best[name])
    shifts = f"save {percent(shift)}" if shift > 0 else f"cost {percent(-shift)}"
    return f"In linear layers {rival.upper()} multiplication would save {percent(best[rival])}; shifts would {shifts}."


def _confidence(found: Explanation) -> str:
    points = f"{100 * found.error.value:.0f} points"
    if found.error.status == "assumed":
        return f"Computed savings may be off by {points} here: an assumption, no one has checked them on this target."
    return f"On models it was not fitted to, computed savings were off by up to {points}."


def percent(part: float) -> str:
    """Write a part of 1 in per cent: one digit below ten."""
    value = 100 * part
    return f"{value:.1f} %" if abs(value) < 9.95 else f"{value:.0f} %"
