"""Whether two models are built alike, whatever their weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import nn

# Where torch's and timm's drop-out modules keep their rates: Dropout, PatchDropout and DropPath.
_RATES = ("p", "prob", "drop_prob")


def differences(model: nn.Module, reference: nn.Module, converted: set[str]) -> Iterator[str]:
    """Yield how `model` differs from `reference`, which may be on the meta device.

    Outside of the `converted` modules, classes and settings are compared module by module, and tensors by name; shapes
    are compared everywhere. Values are not, nor drop-out rates: see `warn_of_drop_rates`.
    """

    def outside(name: str) -> bool:
        return not any(name == c or name.startswith(f"{c}.") for c in converted)

    ours = {n: m for n, m in model.named_modules() if outside(n)}
    theirs = {n: m for n, m in reference.named_modules() if outside(n)}
    for name in ours.keys() ^ theirs.keys():
        yield f"module {name!r} is only in the {'model' if name in ours else 'rebuilt one'}"
    for name, module in theirs.items():
        # Drop-out does nothing in the eval mode that `load` returns, and timm uses Identity at rate 0.
        if any(_is_drop(m) for m in (module, ours[name])):
            continue
        if type(ours[name]) is not type(module) or ours[name].extra_repr() != module.extra_repr():
            yield f"{name!r} is {_brief(ours[name])}, rebuilt {_brief(module)}"
    mine, rebuilt = model.state_dict(), reference.state_dict()
    for key, tensor in rebuilt.items():
        if key in mine and mine[key].shape != tensor.shape:
            yield f"{key!r} has shape {tuple(mine[key].shape)}, rebuilt {tuple(tensor.shape)}"
    for key in mine.keys() ^ rebuilt.keys():
        if outside(key.rpartition(".")[0]):
            yield f"tensor {key!r} is only in the {'model' if key in mine else 'rebuilt one'}"


def warn_of_drop_rates(model: nn.Module, reference: nn.Module) -> None:
    """Warn where drop-out rates of `model` are not those of `reference`, which `load` builds: it trains differently."""
    theirs = dict(reference.named_modules())
    lost = [
        f"{name!r} {_rate(module):g} (then {_rate(theirs[name]):g})"
        for name, module in model.named_modules()
        if name in theirs and _rate(module) != _rate(theirs[name])
    ]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        warnings.warn(
            f"load will not keep these drop-out rates, which matter in training only: {', '.join(lost[:3])}{more}; "
            "rates given to vitrify.create_model are kept",
            # Said of the caller of `save`.
            stacklevel=6,
        )


def _is_drop(module: nn.Module) -> bool:
    return "Drop" in type(module).__name__


def _rate(module: nn.Module) -> float:
    rates = (getattr(module, name, None) for name in _RATES) if _is_drop(module) else ()
    return float(next((rate for rate in rates if rate is not None), 0))


def _brief(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"
