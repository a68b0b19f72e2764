"""Measure renderers on held-out views: picture by picture, into a folder, and on from there after a stop."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrify.errors import InputError
from vitrify.files import write_atomically
from vitrify.nvs import pictures
from vitrify.nvs.baselines import mean_on_a_plane, nearest_source
from vitrify.nvs.metrics import compare
from vitrify.nvs.model import GNT
from vitrify.nvs.render import Progress, Rendering, render
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.scenes_io import held_out_views
from vitrify.nvs.selection import nearest_views

Renderer = Callable[[Scene, View, Sequence[int]], "Rendering | Tensor"]
Record = dict[str, Any]
BASELINES: dict[str, Renderer] = {"nearest view": nearest_source, "mean on a plane": mean_on_a_plane}
SETTINGS = "settings.json"
_ROUNDING = 2 / 255  # more than a PNG's 8 bits lose


def renderer(model: GNT, *, chunk: int = 1024, progress: Progress | None = None) -> Renderer:
    """Return the renderer that `model` is."""

    def run(scene: Scene, target: View, sources: Sequence[int]) -> Rendering:
        return render(model, scene, target, sources, chunk=chunk, progress=progress)

    return run


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make `folder` one of pictures with these settings, or go on with one that is.

    Raises InputError if it holds pictures made with others, naming which.
    """
    file = folder / SETTINGS
    if file.is_file():
        try:
            stored = dict(json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"cannot read {file}: {error}") from error
        differing = [key for key in {**stored, **settings} if stored.get(key) != settings.get(key)]
        if differing:
            listed = "; ".join(f"{key} was {stored.get(key)!r}, is now {settings.get(key)!r}" for key in differing)
            raise InputError(f"{folder} holds pictures of other settings: {listed}. Choose another folder or delete it")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds no pictures of this command: choose another folder")
    write_atomically(file, json.dumps(dict(settings), indent=1) + "\n")


def evaluate(
    name: str,
    run: Renderer,
    scene: Scene,
    folder: Path,
    *,
    sources: int,
    views: Sequence[int] | None = None,
    say: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Render held-out views of a scene from its other views, and return a record of each.

    Args:
        name: of the renderer, in the records and the files' names.
        run: the renderer.
        scene: its held-out views (see `held_out_views`) are targets, never sources.
        folder: gets SCENE/VIEW/ with truth.png, and for the renderer NAME.png, NAME-error.png, NAME-depth.png where it
            has depths, and NAME.json, the record, last: what has one there is not rendered again.
        sources: how many source views, the nearest.
        views: indices of the targets; default: all held-out views.
        say: called with each record.

    Returns:
        Records with "scene", "view", "renderer", "psnr" (dB), "ssim", "lpips" where it can be measured, "seconds", and
        "unseen", the share of pixels that no source view sees, where the renderer knows.

    Raises:
        InputError: a target that is not held out, no view left to render from, a record that is damaged or of another
            picture.
    """
    hidden = held_out_views(scene)
    targets = hidden if views is None else list(views)
    if visible := sorted(set(targets) - set(hidden)):
        raise InputError(f"scene {scene.name!r}: view {visible[0]} is not held out; these are: {hidden}")
    records = []
    for index in targets:
        target = scene.views[index]
        file = picture_file(folder, scene.name, target.name, name).with_suffix(".json")
        if file.is_file():
            records.append(_stored(file, target))
            continue
        chosen = nearest_views(scene, target.camera_to_world, sources, exclude=hidden)
        started = time.perf_counter()
        out = run(scene, target, chosen)
        seconds = time.perf_counter() - started
        picture, truth = (out.rgb if isinstance(out, Rendering) else out), target.rgb()
        record: Record = {"scene": scene.name, "view": target.name, "renderer": name, **compare(picture, truth)}
        record["seconds"] = round(seconds, 4)
        files = {(name, ""): picture, (name, "-error"): pictures.error_map(picture, truth), ("truth", ""): truth}
        if isinstance(out, Rendering):
            record["unseen"] = (out.coverage == 0).float().mean().item()
            files[name, "-depth"] = pictures.depth_map(out.depth, scene)
        for (shown, kind), content in files.items():
            write_atomically(picture_file(folder, scene.name, target.name, shown, kind), pictures.png(content))
        write_atomically(file, json.dumps(record, indent=1) + "\n")
        records.append(record)
        say(record)
    return records


def _stored(file: Path, target: View) -> Record:
    """Return the record in `file`. Raises InputError where it is not one of this view."""
    try:
        record = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {file}: {error}; without it, the view is rendered again") from error
    if missing := sorted({"scene", "view", "renderer", "psnr", "ssim", "seconds"} - record.keys()):
        raise InputError(f"{file} has no {missing[0]}; without it, the view is rendered again")
    truth = file.with_name("truth.png")
    if truth.is_file():
        stored, shown = pictures.read_png(truth), target.rgb()
        if stored.shape != shown.shape or (stored - shown).abs().max() > _ROUNDING:
            raise InputError(f"{truth} is not view {target.name!r}, but another of that name: choose another folder")
    return record


def picture_file(folder: Path, scene: str, view: str, renderer: str, kind: str = "") -> Path:
    """Return where `evaluate` writes a picture; renderer "truth" too; kind: "" (the picture), "-error" or "-depth"."""
    place = Path(view).with_suffix("").as_posix().removeprefix("./").replace("/", "_")
    return folder / scene / place / f"{renderer.replace(' ', '-')}{kind}.png"


def summary(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return for each renderer its mean "psnr", "ssim" and, where all have it, "lpips": of views, then of scenes."""
    names = list(dict.fromkeys(record["renderer"] for record in records))
    return {name: _means([record for record in records if record["renderer"] == name]) for name in names}


def _means(records: Sequence[Record]) -> dict[str, float]:
    scenes: dict[str, list[Record]] = {}
    for record in records:
        scenes.setdefault(record["scene"], []).append(record)
    keys = [key for key in ("psnr", "ssim", "lpips") if all(key in record for record in records)]
    return {
        key: statistics.mean(statistics.mean(record[key] for record in views) for views in scenes.values())
        for key in keys
    }
