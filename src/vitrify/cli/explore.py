"""`vitrify explore`: which designs of an accelerator suit a model best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrify.cli import options
from vitrify.errors import InputError, VitrifyError

if TYPE_CHECKING:
    from vitrify.accelerator.explore import Exploration, Trial
    from vitrify.accelerator.explore.run import Progress
    from vitrify.accelerator.explore.trials import Outcome

_LOG_WIDTH = 200
_MOST_ROWS = 12
_SHOWN = ("latency_ms", "energy_mj", "power_w", "total_mm2")
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify explore deit_tiny_patch16_224 --space examples/explore_vitality.yaml --trials 40 --output runs/space\n\n"
    'vitrify explore deit_tiny_patch16_224 --space mine.yaml --objective latency,energy --constraint "total_mm2<=3" '
    "--sampler optuna --output runs/front\n\n"
    "vitrify simulate deit_tiny_patch16_224 --hardware runs/space/best.yaml\n\n"
    "[bold]A space[/bold] gives places of the hardware description (src/vitrify/accelerator/presets) a list of values "
    "or a range. Places with commas between take the same value:\n\n"
    "engines.general.rows, engines.general.columns: {low: 16, high: 128, factor: 2}\n\n"
    "sram_kib: {low: 100, high: 400, step: 100}\n\n"
    "dram.gb_per_s: [19.2, 76.8]\n\n"
    "engines.general.dataflows: \\[\\[weight], \\[output], \\[weight, output, input]]\n\n"
    "numbers.activation_bits, engines.general.left_bits: \\[6, 8]   (accuracy: vitrify eval --hardware)\n\n"
    "schedule: \\[vitality, vitality-affine]\n\n"
    "[bold]Constraints[/bold] are on latency_ms, energy_mj, chip_mj (energy without DRAM), edp_mj_ms, power_w, "
    "total_mm2 and cycles, of one forward pass. All designs run one model: the one that `vitrify simulate` runs on "
    "--hardware. The objective also chooses how each design's layers are cut into tiles (of two, the first that is "
    "latency, energy or edp): by energy or edp a trial takes many times as long as by latency.\n\n"
    "[bold]Stopped[/bold] at any moment, even by SIGKILL, an exploration goes on when the same command is given again, "
    "and ends with the same trials; more --trials add to them. On a cluster its nodes need vitrify."
)


def explore(
    model: options.ModelArgument,
    space: Annotated[
        Path, typer.Option(metavar="FILE", help="Places and values, as YAML or JSON.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="trials.csv, pareto.png, best.yaml.", show_default=False),
    ],
    hardware: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The start: a preset's name, or a description of your own.")
    ] = "vitality",
    objective: Annotated[
        str,
        typer.Option(
            metavar="NAME[,NAME]", help="What to make least: latency, energy, edp, power or area, or two of these."
        ),
    ] = "latency",
    constraint: Annotated[
        list[str] | None,
        typer.Option(metavar="QUANTITY<=NUMBER", help="A limit, such as total_mm2<=3. May be repeated; >= too."),
    ] = None,
    sampler: Annotated[
        str, typer.Option(metavar="random|grid|optuna", help="optuna: TPE, or NSGA-II for two objectives; an extra.")
    ] = "random",
    trials: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many different designs to try.", show_default="100; a grid tries all"),
    ] = None,
    seed: Annotated[int, options.at_least(0, "Seed of random and optuna.")] = 0,
    workers: Annotated[
        int | None, options.at_least(1, "Designs at a time. Default: one on each core, two on a cluster's.")
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A Ray cluster's: auto, local, or HOST:PORT; an extra.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="How MODEL is converted, if --hardware runs the converted model.",
            show_default="as for `vitrify simulate`",
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
) -> None:
    """Simulate a model on many designs of an accelerator, and find the best and the Pareto front."""
    from rich.console import Console

    from vitrify import recipes
    from vitrify.accelerator import explore as exploring
    from vitrify.accelerator.explore import samplers
    from vitrify.accelerator.explore.space import read
    from vitrify.accelerator.explore.trials import read_constraint, read_objectives
    from vitrify.accelerator.explore.workers import cores
    from vitrify.accelerator.hardware import load
    from vitrify.cli.on_hardware import Models

    # Before a large model is built.
    start = load(hardware)
    chosen = read(space, start)
    objectives, limits = read_objectives(objective), [read_constraint(text) for text in constraint or ()]
    samplers.count_trials(sampler, chosen, trials)
    samplers.version(sampler)
    if recipe is not None:
        recipes.get(recipe)
    with Console(stderr=True).status("building the model"):
        workload = Models(model, img_size, recipe, batch_size, taylor).workload(start)

    def value(outcome: Outcome) -> float | None:
        if outcome.status != "done" or any(limit.excess(outcome.quantities) > 0 for limit in limits):
            return None
        return outcome.quantities[objectives[0]]

    try:
        with _bar(objectives[0], value) as progress:
            found = exploring.explore(
                workload,
                start,
                chosen,
                output,
                objective=objective,
                constraints=constraint or (),
                sampler=sampler,  # type: ignore[arg-type]  # checked there
                trials=trials,
                seed=seed,
                workers=cores() if workers is None and ray is None else workers,
                ray=ray,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted\nthe same command goes on from {output}", err=True)
        raise typer.Exit(130) from None
    _print(found)
    _write(found, output, f"{model} on {start.name}")
    if failed := [trial for trial in found.trials if trial.status == "failed"]:
        raise VitrifyError(
            f"{len(failed)} designs made the simulator fail, the first by {failed[0].reason}: trials.csv says which. "
            "The same command tries them again"
        )


@contextmanager
def _bar(quantity: str, value: Callable[[Outcome], float | None]) -> Iterator[Progress]:
    """Give what shows the trials done and the least value so far: a bar on a terminal, ten lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("exploring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    least: float | None = None
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, outcome: Outcome) -> None:
            nonlocal least
            found = value(outcome)
            least = found if least is None else least if found is None else min(least, found)
            note = "no design within the constraints yet" if least is None else f"best {quantity} {least:.4g}"
            bar.update(task, completed=done, total=total, description=note)
            if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
                typer.echo(f"{done} of {total}: {note}", err=True)

        yield progress


def _print(found: Exploration) -> None:
    from rich.console import Console
    from rich.table import Table

    from vitrify.accelerator.explore.space import show

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    x, y = found.plane
    front = found.front
    title = f"Pareto front, {x} against {y}: {len(front)} of {len(found.trials)} designs"
    rows = list(front)
    if len(front) > _MOST_ROWS:
        rows = [front[i * (len(front) - 1) // (_MOST_ROWS - 1)] for i in range(_MOST_ROWS)]
        title += f", of which {_MOST_ROWS} (trials.csv has all)"
    table = Table(title=title, title_justify="left", show_edge=False)
    for axis in found.space.axes:
        table.add_column(_short(axis), overflow="fold")
    shown = list(dict.fromkeys((*found.plane, *_SHOWN)))
    for quantity in shown:
        table.add_column(quantity, justify="right")
    for trial in rows:
        values = (f"{trial.quantities[quantity]:.4g}" for quantity in shown)
        table.add_row(*map(show, trial.design.values()), *values)
    if rows:
        console.print(table)
    reasons = Counter(trial.reason for trial in found.trials if trial.status == "refused")
    if reasons:
        reason, count = reasons.most_common(1)[0]
        typer.echo(f"{reasons.total()} designs cannot be; {count} of them: {reason}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(_verdict(found))


def _short(axis: str) -> str:
    return axis.replace("engines.", "").replace(", ", ",\n")


def _verdict(found: Exploration) -> str:
    """Say which design is the best, and how it differs from the start."""
    from vitrify.accelerator.explore.space import show

    limits = ", ".join(map(str, found.constraints))
    best, start = found.best, found.start
    if best is None:
        return f"no design of {len(found.trials)} keeps to {limits}" if limits else "no design can be simulated"
    quantities = list(dict.fromkeys((*found.objectives, *found.plane, "energy_mj", "latency_ms")))
    said = "; ".join(f"{name} {_beside(best, start, name)}" for name in quantities)
    moved = "; ".join(
        f"{axis} {show(start.design[axis])} -> {show(value)}"
        for axis, value in best.design.items()
        if value != start.design[axis]
    )
    text = f"best{f' within {limits}' if limits else ''}: {said}\nby {moved or 'changing nothing: it is the start'}"
    if start.status != "done":
        text += f"\nthe start itself cannot be: {start.reason}"
    elif broken := found.broken(start):
        text += f"\nthe start itself breaks {', '.join(broken)}"
    return text


def _beside(best: Trial, start: Trial, quantity: str) -> str:
    value = best.quantities[quantity]
    if start.status != "done":
        return f"{value:.4g}"
    before = start.quantities[quantity]
    if value == before:
        return f"{value:.4g} (as at the start)"
    ratio = f"{before / value:.2f}x less" if value < before else f"{value / before:.2f}x more"
    return f"{value:.4g} ({ratio} than {before:.4g})"


def _write(found: Exploration, output: Path, title: str) -> None:
    import yaml

    from vitrify.accelerator.hardware import describe
    from vitrify.errors import optional
    from vitrify.files import write_atomically

    written = [output / "trials.csv"]
    best = output / "best.yaml"
    if found.best is None:
        # An earlier run, with other constraints, may have found one.
        best.unlink(missing_ok=True)
    else:
        write_atomically(best, yaml.safe_dump(describe(found.hardware_of(found.best, "best")), sort_keys=False))
        written.append(best)
    try:
        with optional("matplotlib", "report", "pareto.png"):
            from vitrify.report.figures import save_png
            from vitrify.report.pareto import pareto
    except InputError as error:
        typer.echo(f"not written: {error}", err=True)
    else:
        save_png(pareto(found, f"{title}: {len(found.trials)} designs"), output / "pareto.png")
        written.append(output / "pareto.png")
    typer.echo(f"written: {', '.join(map(str, written))}")
