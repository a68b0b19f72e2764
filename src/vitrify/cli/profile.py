"""`vitrify profile`: what a model costs, by module group, and what a recipe makes of it."""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options, weightless

if TYPE_CHECKING:
    from rich.table import Table

    from vitrify.convert import Recipe
    from vitrify.cost.profile import Costs, Profile

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify profile deit_tiny_patch16_224\n\n"
    "vitrify profile pvt_v2_b0 --recipe shiftaddvit --csv costs.csv --json costs.json\n\n"
    "vitrify profile vit_huge_patch14_224 --recipe taylor --img-size 448 --batch-size 8 --target a100\n\n"
    "vitrify profile runs/tuned\n\n"
    "[bold]What is counted[/bold]: multiplications and additions of matrices and of elements (each product's "
    "accumulation is an addition); shifts; others are divisions, exponentials, roots and comparisons. Energy and DRAM "
    "bytes are those of the Eyeriss model, like for like; latency is a roofline of the target. No weights are loaded."
)

# Header, and what a cell of that column shows.
_COLUMNS: Mapping[str, Any] = {
    "parameters": lambda c: f"{c.parameters:,}",
    "mult. M": lambda c: _short(c.multiplications * 1e-6),
    "add. M": lambda c: _short(c.additions * 1e-6),
    "shift M": lambda c: _short(c.shifts * 1e-6),
    "others M": lambda c: _short(c.others * 1e-6),
    "energy mJ": lambda c: _short(c.energy_pj * 1e-9),
    "weights MB": lambda c: _short(c.weight_bytes * 1e-6),
    "activ. MB": lambda c: _short(c.activation_bytes * 1e-6),
    "DRAM MB": lambda c: _short(c.dram_bytes * 1e-6),
    "latency us": lambda c: _short(c.latency_s * 1e6),
}


def profile(
    model: options.ModelArgument,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Also convert the model by this recipe (`vitrify recipes` lists them), and show both.",
        ),
    ] = None,
    img_size: options.ImgSizeOption = None,
    batch_size: Annotated[int, options.at_least(1, "Images at a time.")] = 1,
    target: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="What the latency is for: h100, h200, a100, rtx3090, jetson_tx2, cpu, or a file of `vitrify probe`.",
        ),
    ] = "h100",
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write the table to this file.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write it there, with what it was made with.")
    ] = None,
) -> None:
    """Show what a model costs: operations, energy, bytes and latency of each module group, and in total.

    With --recipe the original stands beside the converted model; groups that did not change have one line.
    """
    from rich.console import Console

    from vitrify import recipes
    from vitrify.cost import target_file
    from vitrify.files import write_atomically

    # Before the work, not after it.
    for option, file in (("--csv", csv_file), ("--json", json_file)):
        options.check_writable(option, file)
    target_file.load(target)
    chosen = None if recipe is None else recipes.get(recipe)
    found = dict(_profiles(model, chosen, img_size, batch_size, target))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(_table(found))
    for note in _notes(found):
        typer.echo(note)
    if csv_file is not None:
        write_atomically(csv_file, _csv(found))
        typer.echo(f"written: {csv_file}")
    if json_file is not None:
        write_atomically(json_file, _json(model, chosen, found))
        typer.echo(f"written: {json_file}")


def _profiles(
    spec: str, recipe: Recipe | None, img_size: int | None, batch_size: int, target: str
) -> Iterator[tuple[str, Profile]]:
    """Yield ("original", its profile), and with a recipe ("converted", its profile)."""
    from rich.console import Console

    from vitrify.convert import convert_
    from vitrify.cost.profile import profile as profile_

    console = Console(stderr=True)
    with console.status("building") as status:

        def progress(what: str) -> None:
            if console.is_terminal:
                status.update(what)

        built, size = weightless.load(spec, img_size)
        yield "original", profile_(built, size, batch_size, target=target, progress=progress)
        if recipe is not None:
            progress("converting")
            conversion = convert_(built, recipe, input_size=size)
            counts = ", ".join(f"{len(getattr(conversion, group))} {group}" for group in ("changed", "kept", "refused"))
            console.print(f"recipe {recipe.name}: {counts} (`vitrify convert` says why)", markup=False)
            yield "converted", profile_(built, size, batch_size, target=target, progress=progress)


def _groups(found: Mapping[str, Profile]) -> list[tuple[str, dict[str, Costs]]]:
    """Return each group's costs by model, in the order of the original; groups that only one has are there too."""
    names = dict.fromkeys(group for profile in found.values() for group in profile.rows)
    return [(name, {which: p.rows[name] for which, p in found.items() if name in p.rows}) for name in names]


def _table(found: Mapping[str, Profile]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    original = found["original"]
    shape = " x ".join(map(str, original.input_shape))
    table = Table(
        title=f"{original.model}, input {shape}; energy: {original.energy.target}, {original.energy.preset}; "
        f"latency: {original.latency.target.name}, {original.latency.dtype}, {original.latency.fusion}",
        title_justify="left",
        show_edge=False,
    )
    table.add_column("module group", overflow="fold")
    if len(found) > 1:
        table.add_column("")
    for header in _COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    totals = {which: profile.total for which, profile in found.items()}
    for name, rows in (*_groups(found), ("total", totals)):
        if name == "total":
            table.add_section()
        same = len(rows) > 1 and rows["original"] == rows["converted"]
        for index, (which, costs) in enumerate(rows.items()):
            if same and index:
                continue
            labels = [] if len(found) == 1 else ["both" if same else which]
            table.add_row("" if index else escape(name), *labels, *(show(costs) for show in _COLUMNS.values()))
    return table


def _notes(found: Mapping[str, Profile]) -> Iterator[str]:
    if "converted" in found:
        before, after = (found[which].total for which in ("original", "converted"))
        fields = ("multiplications", "energy_pj", "dram_bytes", "latency_s")
        ratios = (
            f"{field.partition('_')[0]} {_ratio(getattr(after, field), getattr(before, field))}" for field in fields
        )
        yield f"converted / original: {', '.join(ratios)}"
    for which, profile in found.items():
        if profile.unknown:
            listed = ", ".join(f"{name} ({count})" for name, count in profile.unknown.items())
            yield f"not counted in the {which} model, as no rule knows them: {listed}"


def _csv(found: Mapping[str, Profile]) -> str:
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for which, profile in found.items():
        for group, costs in (*profile.rows.items(), ("total", profile.total)):
            row = {"model": which, "group": group, **asdict(costs)}
            if writer is None:
                writer = csv.DictWriter(text, list(row), lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
    return text.getvalue()


def _json(spec: str, recipe: Recipe | None, found: Mapping[str, Profile]) -> str:
    original = found["original"]
    latency = original.latency
    models = {
        which: {
            "groups": {group: asdict(costs) for group, costs in profile.rows.items()},
            "total": asdict(profile.total),
            "unknown": dict(profile.unknown),
        }
        for which, profile in found.items()
    }
    data = {
        "command": shlex.join(["vitrify", *sys.argv[1:]]),
        "model": spec,
        "recipe": None if recipe is None else recipe.to_dict(),
        "input_shape": list(original.input_shape),
        "energy": {"target": original.energy.target, "preset": original.energy.preset},
        "latency": {"target": latency.target.name, "dtype": latency.dtype, "fusion": latency.fusion},
        **models,
    }
    return json.dumps(data, indent=2) + "\n"


def _ratio(after: float, before: float) -> str:
    return f"{after / before:.2f}x" if before else "-"


def _short(value: float) -> str:
    """Write three digits, or all of the whole part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
