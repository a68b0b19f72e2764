"""`vitrify simulate`: a model on a modelled accelerator, beside others; a table, a timeline, a trace."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options
from vitrify.cli.on_hardware import Models, takes_recipe
from vitrify.errors import InputError, optional, unknown

if TYPE_CHECKING:
    from vitrify.accelerator.hardware import Hardware
    from vitrify.accelerator.masks import Masks
    from vitrify.report.breakdown import Breakdown
    from vitrify.report.simulation import Grid, Run

_LOG_WIDTH = 200
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify simulate deit_base_patch16_224 --hardware vitality\n\n"
    "vitrify simulate deit_tiny_patch16_224 --compare sanger,vitcod,systolic --equal area --html timeline.html\n\n"
    "vitrify simulate runs/tuned --hardware mine.yaml --trace trace.json        (open it in ui.perfetto.dev)\n\n"
    "[bold]Which model runs where[/bold]: hardware whose schedule is made for linear attention (vitality, "
    "vitality-affine, g-stationary), or that has arrays which shift or add, runs the converted model: MODEL as it was "
    "converted, or MODEL converted by --recipe. All other hardware (systolic, sanger, vitcod) runs the original model "
    'with softmax attention, also where MODEL is converted. The column "attention" says which it was.\n\n'
    "No weights are loaded. Sparse attention takes its masks from --masks; without, they are synthetic."
)


def simulate(
    model: options.ModelArgument,
    hardware: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A preset's name, or a description of your own as YAML or JSON.")
    ] = "vitality",
    compare: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Other hardware, names or files, to set beside it.")
    ] = None,
    equal: Annotated[
        str | None,
        typer.Option(metavar="area|macs", help="Scale the others' arrays to the area, or the PEs, of --hardware."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="How MODEL is converted where the converted model runs (`vitrify recipes` lists them).",
            show_default="what MODEL is; else vitality, and vitrify on arrays that shift or add",
        ),
    ] = None,
    batch_size: Annotated[int, options.at_least(1, "Images at a time.")] = 1,
    img_size: options.ImgSizeOption = None,
    taylor: Annotated[
        str | None,
        typer.Option(
            metavar="algorithm1|affine",
            help="How Taylor attention is computed.",
            show_default="affine on vitality-affine, else algorithm1",
        ),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="Another schedule for --hardware than its own.")
    ] = None,
    pipeline: Annotated[
        bool,
        typer.Option(
            " /--no-pipeline",
            help="On --hardware, each step of attention waits for the one before.",
            show_default=False,
        ),
    ] = True,
    masks: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Masks for sparse attention: an .npz that `Masks.save` wrote.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write --hardware's timeline as a Chrome trace (.json).")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page with the timeline and everything else; extra report."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results here too.")
    ] = None,
) -> None:
    """Simulate a forward pass on an accelerator, tile by tile: time, energy, area, and what waits for what."""
    from rich.console import Console

    from vitrify.report import breakdown, simulation

    for option, file in (("--trace", trace), ("--html", html), ("--json", json_file)):
        options.check_writable(option, file)
    if html is not None:
        with optional("matplotlib", "report", "--html"):
            from vitrify.report import timeline
    machines = _machines(hardware, compare, equal, schedule)
    _check_taken(machines, recipe, taylor, masks)
    given = _read_masks(masks)
    console = Console(stderr=True)
    with console.status("building the model") as status:
        models = Models(model, img_size, recipe, batch_size, taylor)
        runs: list[Run] = []
        for machine in machines:
            status.update(f"simulating {machine.name}")
            runs.append(_run(models, machine, given, pipeline=pipeline or bool(runs)))
    found = breakdown.breakdown(runs[0].result, breakdown.groups_of(models.workload(machines[0]), models.layout))
    tables = [
        simulation.comparison(runs),
        simulation.shares(runs[0], found),
        simulation.engines(runs[0], found),
        simulation.stalls(found),
    ]
    notes = list(simulation.notes(runs))
    _print(f"{model}, {models.size_text}", tables, notes)
    command = shlex.join(["vitrify", *sys.argv[1:]])
    if json_file is not None:
        _write(json_file, json.dumps(_data(command, model, models, equal, runs, found, notes), indent=2) + "\n")
    if trace is not None:
        _write(trace, json.dumps(runs[0].result.trace()) + "\n")
    if html is not None:
        _write(html, timeline.page(f"{model} on {runs[0].name}", models.size_text, runs, found, notes, command))


def _write(file: Path, text: str) -> None:
    from vitrify.files import write_atomically

    write_atomically(file, text)
    typer.echo(f"written: {file}")


def _machines(hardware: str, compare: str | None, equal: str | None, schedule: str | None) -> list[Hardware]:
    """Return the hardware asked for first, and then what to compare it with, at its budget if that was asked for."""
    import vitrify.accelerator.sparse  # noqa: F401  (registers its schedules)
    from vitrify.accelerator.budget import matched
    from vitrify.accelerator.hardware import load
    from vitrify.accelerator.schedules import SCHEDULES

    main = load(hardware)
    if schedule is not None:
        if schedule not in SCHEDULES:
            raise unknown("schedule", schedule, SCHEDULES)
        main = replace(main, schedule=schedule)
    others = [load(name.strip()) for name in compare.split(",")] if compare is not None else []
    if equal is not None:
        if not others:
            raise InputError("--equal needs hardware to scale: add --compare")
        others = [matched(other, main, equal) for other in others]  # type: ignore[arg-type]  # checked there
    return [main, *others]


def _check_taken(machines: list[Hardware], recipe: str | None, taylor: str | None, masks: Path | None) -> None:
    """Raise InputError for options that no hardware would look at, and a recipe that does not exist."""
    from vitrify import recipes
    from vitrify.accelerator.sparse import DENSITIES

    names = ", ".join(machine.name for machine in machines)
    for option, given in (("--recipe", recipe), ("--taylor", taylor)):
        if given is not None and not any(map(takes_recipe, machines)):
            raise InputError(f"{option}: {names} runs the original model; add --compare vitality, say")
    if masks is not None and not any(machine.schedule in DENSITIES for machine in machines):
        raise InputError(f"--masks: {names} has no use for them; {', '.join(DENSITIES)} has")
    if recipe is not None:
        recipes.get(recipe)


def _read_masks(file: Path | None) -> Masks | None:
    from vitrify.accelerator.masks import Masks

    return None if file is None else Masks.load(file)


def _run(models: Models, machine: Hardware, masks: Masks | None, *, pipeline: bool) -> Run:
    from vitrify.accelerator.simulate import simulate as simulate_
    from vitrify.report.simulation import Run, attention_of

    graph = models.workload(machine)
    result = simulate_(graph, machine, pipeline=pipeline, masks=masks)
    sparse = ", sparse" if any(placement.kept for placement in result.placements) else ""
    return Run(machine.name, f"{attention_of(graph)}{sparse} ({models.model_on(machine)})", result)


def _print(what: str, tables: list[Grid], notes: list[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    for grid in tables:
        if not grid.rows:
            continue
        shown = Table(
            title=escape(grid.title or what),
            title_justify="left",
            caption=escape(grid.caption) or None,
            caption_justify="left",
            show_edge=False,
        )
        for header, cell in zip(grid.header, grid.rows[0], strict=True):
            shown.add_column(escape(header), justify="left" if cell[:1].isalpha() else "right", overflow="fold")
        for row in grid.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
        console.print()
    for note in notes:
        console.print(f"note: {note}", markup=False)


def _data(
    command: str,
    spec: str,
    models: Models,
    equal: str | None,
    runs: list[Run],
    found: Breakdown,
    notes: list[str],
) -> dict[str, Any]:
    from vitrify.report.simulation import to_dict

    return {
        "command": command,
        "model": spec,
        "input_shape": models.input_shape,
        "equal": equal,
        "runs": [to_dict(run) for run in runs],
        "main_array": found.main,
        "shares": {group: asdict(share) for group, share in found.shares.items()},
        "uses": {name: asdict(use) for name, use in found.uses.items()},
        "stalls": [stall._asdict() for stall in found.stalls],
        "notes": notes,
    }
