"""The page of the demo of novel views, and its figures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from vitrify.nvs.evaluate import BASELINES, picture_file
from vitrify.nvs.evaluate import summary as means
from vitrify.nvs.pictures import ERROR_SCALE, read_png
from vitrify.report import figures, html
from vitrify.report.figures import GREY, INK, new_figure, style
from vitrify.report.html import Fact, Picture, Report, Section, Table
from vitrify.report.views.results import Results

_ROWS = {"": "picture", "-error": "error", "-depth": "depth"}


def write(results: Results, output: Path) -> None:
    """Write report.html and figures/*.png into `output`."""
    drawn = draw(results)
    (output / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figures.save_png(figure, output / "figures" / f"{name}.png")
    html.write(report(results, drawn), output / "report.html")


def draw(results: Results) -> dict[str, Figure]:
    """Return every figure by its file name."""
    shots = dict.fromkeys((record["scene"], record["view"]) for record in results.records)
    drawn = {f"{scene}-{Path(view).stem}": _shot(results, scene, view) for scene, view in shots}
    return drawn | {f"routing-{model}": _routing(maps) for model, maps in results.routing.items()}


def _shot(results: Results, scene: str, view: str) -> Figure:
    """Draw one view: a column for each renderer, the truth first; below each its error and its depth."""
    records = [record for record in results.records if (record["scene"], record["view"]) == (scene, view)]
    with style():
        figure = new_figure(1.75 * (len(records) + 1), 1.4 * len(_ROWS) + 0.35)
        grid = figure.subplots(len(_ROWS), len(records) + 1, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        _show(grid[0][0], read_png(picture_file(results.pictures, scene, view, "truth")), "truth")
        for column, record in enumerate(records, start=1):
            for row, kind in enumerate(_ROWS):
                file = picture_file(results.pictures, scene, view, record["renderer"], kind)
                if file.is_file():
                    title = f"{record['renderer']}\n{record['psnr']:.2f} dB" if row == 0 else ""
                    _show(grid[row][column], read_png(file), title)
    return figure


def _routing(maps: dict[str, Tensor]) -> Figure:
    """Draw, for each mixture, which share of each ray's points multiplies."""
    columns = min(5, len(maps))
    rows = -(-len(maps) // columns)
    with style():
        figure = new_figure(1.9 * columns + 0.7, 1.65 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        colours = ScalarMappable(Normalize(0, 1), "viridis")
        for axes, (name, multiplies) in zip(grid.flat, maps.items(), strict=False):
            shares = multiplies.float().mean(-1)
            axes.imshow(shares.numpy(), cmap=colours.cmap, norm=colours.norm, interpolation="nearest")
            axes.set_title(f"{_short(name)}\n{shares.mean().item():.0%}", fontsize=8, pad=2)
        bar = figure.colorbar(colours, ax=grid, fraction=0.03, pad=0.015)
        bar.set_label("points that multiply", color=INK)
        bar.outline.set_edgecolor(GREY)
    return figure


def report(results: Results, drawn: dict[str, Figure]) -> Report:
    """Return the page."""
    found, reference = means(results.records), results.reference
    names = ", ".join(scene.name for scene in results.scenes)
    facts = [Fact(f"{found[name]['psnr']:.2f} dB", f"PSNR, {name}") for name in BASELINES]
    if reference is not None:
        best = max(found[name]["psnr"] for name in BASELINES)
        gain = found[reference]["psnr"] - best
        facts.insert(
            0,
            Fact(f"{found[reference]['psnr']:.2f} dB", f"PSNR, {reference}", f"{gain:+.2f} dB to the best trivial one"),
        )
    return Report(
        title="New views of scenes that were never seen",
        lead=(
            f"GNT renders a view from its {results.sources} nearest photographs, by attention alone. The scenes here "
            f"({names}) are held out: what `vitrify nvs train` trains on by default lacks them. Everything below was "
            "measured by the run that wrote this page."
        ),
        facts=facts,
        sections=[_pictures(results, drawn), _numbers(results), *_routes(results, drawn)],
        colophon=[
            ("Scenes", f"{names}: rendered by Mitsuba 3, tools/render_scenes.py"),
            ("Machine", str(results.machine)),
            ("Versions", ", ".join(f"{name} {version}" for name, version in results.machine.versions.items())),
        ],
    )


def _pictures(results: Results, drawn: dict[str, Figure]) -> Section:
    shown = [
        Picture.of(
            figure,
            f"The view {name} as it is and as each renderer makes it, with errors and depths",
            f"{name}: the truth, and each renderer's picture with its PSNR; below it the error of each pixel (white: "
            f"{ERROR_SCALE:g} or more) and the depth that the ray attention of the last block gives (near is white).",
        )
        for name, figure in drawn.items()
        if not name.startswith("routing-")
    ]
    return Section(
        "Side by side",
        "Two renderers show what needs no learning: the nearest photograph as it is, and the mean of the photographs, "
        "projected onto the plane on which they agree best.",
        shown,
    )


def _numbers(results: Results) -> Section:
    found, reference = means(results.records), results.reference
    rows = []
    for name, values in found.items():
        cost, gap = results.costs.get(name), "-"
        if reference is not None and name in results.costs and name != reference:
            gap = f"{values['psnr'] - found[reference]['psnr']:+.2f}"
        seconds = [record["seconds"] for record in results.records if record["renderer"] == name]
        row = [name, results.recipes.get(name, "-"), f"{values['psnr']:.2f}", gap, f"{values['ssim']:.3f}"]
        if cost is None:
            rows.append([*row, "-", "-", "-", "-", "-", f"{sum(seconds) / len(seconds):.2f}"])
            continue
        counts = [f"{count / 1e9:.2f}" for count in (cost.multiply, cost.shift, cost.add)]
        size = f"{cost.weight_bytes / 2**20:.2f}"
        rows.append([*row, *counts, f"{cost.energy_mj:.0f}", size, f"{sum(seconds) / len(seconds):.2f}"])
    against = "to softmax, dB" if reference is None else f"to {reference}, dB"
    header = ["renderer", "recipe", "PSNR, dB", against, "SSIM", "G multiplications", "G shifts", "G additions"]
    return Section(
        "Numbers",
        "Means over the views of a scene, then over the scenes. Products of one picture are counted from the model's "
        "traced graph; energy is that graph's on the modelled Eyeriss-like machine, operands at their widths as built, "
        "every movement charged (like for like). Seconds are this CPU's, where no layer shifts in hardware.",
        [Table([*header, "energy, mJ", "weights, MiB", "s per picture"], rows)],
    )


def _routes(results: Results, drawn: dict[str, Figure]) -> Iterable[Section]:
    if not results.routing:
        return
    items: list[Picture | Table] = []
    for model, maps in results.routing.items():
        items.append(
            Picture.of(
                drawn[f"routing-{model}"],
                f"Share of each ray's points that each mixture of {model} multiplies",
                f"{model}: of each ray's points, the share that the mixture sends to multiplication.",
            )
        )
        rows = [[_short(name), *(f"{share:.0%}" for share in _thirds(each))] for name, each in maps.items()]
        items.append(
            Table(["mixture", "near third", "middle third", "far third"], rows, "The same by depth on the ray.")
        )
    yield Section("Which rays and points multiply", "In the first view above.", items)


def _thirds(multiplies: Tensor) -> list[float]:
    return [part.float().mean().item() for part in torch.tensor_split(multiplies, 3, dim=-1)]


def _short(name: str) -> str:
    """Shorten coarse.blocks.0.view.mlp to 0.view.mlp."""
    return name.removeprefix("coarse.blocks.")


def _show(axes: Axes, image: Tensor, title: str) -> None:
    if image.ndim == 2:
        axes.imshow(image.numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8, pad=3)
