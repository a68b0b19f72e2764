"""`vitrify explain`: which primitive would pay where in a model, on a target; or that none would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options, weightless

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vitrify.convert import Recipe
    from vitrify.cost.explain import Explanation, Row

_LOG_WIDTH = 160
_RESULTS = Path("benchmarks/results")
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify explain vit_base_patch14_dinov2 --img-size 518\n\n"
    "vitrify explain deit_tiny_patch16_224 --target a100 --batch-size 64 --output recipe.yaml\n\n"
    "vitrify convert deit_tiny_patch16_224 --recipe recipe.yaml --output runs/advised\n\n"
    "vitrify explain runs/tuned --target here.yaml --images ./photos        (here.yaml: vitrify probe)\n\n"
    "Savings are parts of the whole model's time. shift8 shifts on 8-bit activations; int8 and fp8 "
    "multiply, which no recipe here does: they are what one would take instead. Times: src/vitrify/cost/LATENCY.md."
)


def explain(
    model: options.ModelArgument,
    img_size: options.ImgSizeOption = None,
    batch_size: Annotated[int, options.at_least(1, "Images at a time.")] = 1,
    target: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="h100, h200, a100, rtx3090, jetson_tx2, cpu, or a file.")
    ] = "h100",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, tf32, bf16 or fp16.", show_default="the target's: bf16, on a CPU fp32")
    ] = None,
    fusion: Annotated[
        str | None, typer.Option(help="eager or compiled.", show_default="the target's: compiled, on a CPU eager")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Measure the risk on these: each group is converted alone. Needs weights."),
    ] = None,
    limit: Annotated[int, options.at_least(1, "Use so many images, evenly spread.")] = 32,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the recipe here, if one is advised.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result here too.")] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Results of `vitrify bench`: they overrule what is computed.",
            show_default=str(_RESULTS),
        ),
    ] = None,
    pretrained: options.PretrainedOption = False,
    checkpoint: options.CheckpointOption = None,
) -> None:
    """Say where a model spends its time and energy, what each primitive would save there, and whether to convert.

    No weights are needed or loaded, except for --images.
    """
    from rich.console import Console

    import vitrify
    from vitrify.cost import target_file
    from vitrify.data import load_dataset
    from vitrify.errors import InputError
    from vitrify.files import write_atomically

    # Before a large model is built or fetched.
    for option, file in (("--output", output), ("--json", json_file)):
        options.check_writable(option, file)
    target_file.load(target)
    if measured is not None and not measured.is_dir():
        raise InputError(f"--measured {measured}: there is no such folder; `vitrify bench` makes one")
    if images is not None:
        load_dataset(images, "val")
    console = Console(stderr=True)
    with console.status("building the model") as status:
        built, size = _load(model, img_size, pretrained, checkpoint, images is not None)
        found = vitrify.explain(
            built,
            size,
            batch_size,
            target=target,
            dtype=dtype,
            fusion=fusion,  # type: ignore[arg-type]  # checked there
            measured=measured or _RESULTS,
            images=None if images is None else _read(built, images, limit),
            progress=status.update,
        )
    _print(model, found)
    if json_file is not None:
        write_atomically(json_file, json.dumps({"name": model, **found.to_dict()}, indent=2) + "\n")
        typer.echo(f"written: {json_file}")
    _give_recipe(found, output)


def _load(
    spec: str, img_size: int | None, pretrained: bool, checkpoint: Path | None, needs_weights: bool
) -> tuple[nn.Module, tuple[int, int, int]]:
    from vitrify.errors import InputError

    if not needs_weights and not pretrained and checkpoint is None:
        return weightless.load(spec, img_size)
    if not pretrained and checkpoint is None and options.artefact_at(spec) is None:
        raise InputError("--images measures a risk, which random weights do not have: add --pretrained or --checkpoint")
    model = options.load_model(spec, pretrained=pretrained, checkpoint=checkpoint, img_size=img_size).eval()
    return model, weightless.asked_size(model, img_size)


def _read(model: nn.Module, folder: Path, limit: int) -> Tensor:
    import torch

    dataset = options.open_data(str(folder), "val", model, limit=limit)
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def _print(name: str, found: Explanation) -> None:
    from rich.console import Console
    from rich.table import Table

    from vitrify.cost.explain.variants import PRIMITIVES

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _LOG_WIDTH
    size = " x ".join(map(str, found.input_size[1:]))
    measured = found.advice.measured_s
    took = f"{1e3 * found.seconds:.3g} ms" + ("" if measured is None else f" (measured: {1e3 * measured:.3g} ms)")
    how = f"{found.target.title}, {found.dtype}, {found.fusion}"
    title = f"{name}, {size} px, batch {found.batch_size}, on {how}: {took}"
    table = Table(title=title, title_justify="left", show_edge=False, caption_justify="left")
    table.add_column("what")
    shown = [p for p in PRIMITIVES if any(p in row.savings for row in found.rows)]
    for header in ("time", "energy", *shown):
        table.add_column(header, justify="right")
    table.add_column("risk (cosine)")
    for row in found.rows:
        shares = (f"{100 * share:.1f} %" for share in (row.time_share, row.energy_share))
        table.add_row(row.group, *shares, *(_saving(row, primitive) for primitive in shown), _risk(row))
    if shown:
        table.caption = f"{', '.join(shown)}: what each would save there, in % of the whole model's time"
    console.print(table)
    console.print(found.verdict, markup=False)
    if found.unknown:
        console.print(f"note: charged for their bytes alone, as no rule knows them: {', '.join(found.unknown)}")


def _saving(row: Row, primitive: Any) -> str:
    if primitive not in row.savings:
        return "-"
    percent = 100 * row.savings[primitive].time
    return f"[{'green' if percent > 0 else 'red'}]{percent:+.1f}[/]"


def _risk(row: Row) -> str:
    return ", ".join(f"{primitive} {cosine:.3f}" for primitive, cosine in row.risk.items()) or "-"


def _give_recipe(found: Explanation, output: Path | None) -> None:
    import yaml

    from vitrify.files import write_atomically

    recipe = found.advice.recipe
    if recipe is None:
        if output is not None:
            typer.echo(f"not written: {output}, as there is nothing to convert")
        return
    data = _short(recipe)
    as_json = output is not None and output.suffix == ".json"
    text = json.dumps(data, indent=2) + "\n" if as_json else yaml.safe_dump(data, sort_keys=False)
    if output is None:
        typer.echo("\n# vitrify convert MODEL --recipe FILE, with this in FILE (--output writes it):")
        typer.echo(text, nl=False)
    else:
        write_atomically(output, text)
        typer.echo(f"written: {output}")


def _short(recipe: Recipe) -> dict[str, Any]:
    """Return an advised recipe's data without what every recipe has: {"name": "advised", "mlp": "shift"}.

    Advice is given by role (attention, projections, mlp), and nothing else of such a recipe is its own.
    """
    data, plain = recipe.to_dict(), type(recipe)(recipe.name).to_dict()
    found: dict[str, Any] = {"name": recipe.name}
    for role in [key for key, value in data.items() if value != plain[key]]:
        found[role] = own = {key: value for key, value in data[role].items() if value != plain[role][key]}
        if own.keys() <= {"core", "primitive"}:
            found[role] = next(iter(own.values()))
    return found
