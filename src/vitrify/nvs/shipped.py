"""The trained models that ship: artefact folders in weights/."""

from __future__ import annotations

from pathlib import Path

from vitrify.artefact import is_artefact

_WEIGHTS = Path(__file__).parent / "weights"


def shipped_models(folder: Path = _WEIGHTS) -> dict[str, Path]:
    """Return the artefacts in `folder` by name, and those of finished runs (RUN/model) by the run's.

    What is called as the beginning of another, "gnt_small" of "gnt_small-taylor", stands before it.
    """
    found = {path.name: path for path in folder.glob("*") if is_artefact(path)}
    found |= {path.parent.name: path for path in folder.glob("*/model") if is_artefact(path)}
    return dict(sorted(found.items()))
