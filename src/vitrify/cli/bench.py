"""`vitrify bench`: measure attention, or whole models, against their originals; what fails its check is not timed."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options

if TYPE_CHECKING:
    from vitrify.bench import Result

app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure attention, or whole models, against their originals. Wrong outputs are refused, not timed.",
)

BatchOption = Annotated[int, options.at_least(1, "Images at a time.")]
SecondsOption = Annotated[float, options.at_least(0, "Seconds to spend on each case, beside checks and memory.")]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Also write the result into this folder, as BENCHMARK-MACHINE.json.", metavar="FOLDER"
    ),
]
SeedOption = Annotated[int, options.at_least(0, "Seed of the random inputs.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Add every contender under torch.compile.")]


@app.command(epilog="[bold]Example[/bold]\n\nvitrify bench attention --tokens 197,1025 --output benchmarks/results")
def attention(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "197,577,1025,4096,16384",
    heads: Annotated[int, options.at_least(1, "Attention heads.")] = 12,
    head_dim: Annotated[int, options.at_least(1, "Width of one head.")] = 64,
    batch_size: BatchOption = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    compile: CompileOption = False,
    device: options.DeviceOption = "auto",
    seconds: SecondsOption = 10.0,
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Time the attention core: PyTorch's fused softmax attention (SDPA) against Taylor attention.

    On contiguous inputs and on the strides of timm's packed projection. Shows speed-up, peak memory, and the floor that
    this machine's bandwidth and arithmetic set.
    """
    fixed = {
        "heads": heads,
        "head_dim": head_dim,
        "batch_size": batch_size,
        "dtype": dtype,
        "compile": compile,
        "device": str(options.pick_device(device)),
    }
    cases = [{"tokens": _whole_number("--tokens", count), **fixed} for count in tokens.split(",")]
    _run("attention", cases, seconds=seconds, seed=seed, output=output)


@app.command(epilog="[bold]Example[/bold]\n\nvitrify bench models --models deit_tiny_patch16_224:384 --compile")
def models(
    models: Annotated[
        str,
        typer.Option(
            metavar="NAME:SIZE,...",
            help="timm names, each with the image side in pixels.",
            show_default="DeiT-Tiny at 224 and 512, PVTv2-B0 at 224",
        ),
    ] = "deit_tiny_patch16_224:224,deit_tiny_patch16_224:512,pvt_v2_b0:224",
    recipe: options.RecipeOption = "taylor",
    batch_size: BatchOption = 1,
    compile: CompileOption = False,
    device: options.DeviceOption = "auto",
    seconds: SecondsOption = 20.0,
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Time whole models, the original against its conversion, with random weights and images.

    The original must equal its own conversion with the softmax recipe, and every converted attention its float64 value.
    """
    from vitrify.errors import InputError

    cases = []
    for entry in models.split(","):
        name, colon, size = entry.strip().rpartition(":")
        if not colon:
            raise InputError(f"--models: each entry is NAME:SIZE, such as deit_tiny_patch16_224:224, not {entry!r}")
        cases.append(
            {
                "model": name,
                "image_size": _whole_number("--models", size),
                "batch_size": batch_size,
                "recipe": recipe,
                "compile": compile,
                "device": str(options.pick_device(device)),
            }
        )
    _run("models", cases, seconds=seconds, seed=seed, output=output)


def _run(benchmark: str, cases: list[dict[str, Any]], *, seconds: float, seed: int, output: Path | None) -> None:
    if output is not None:
        _check_writable(output)
    from rich.console import Console

    from vitrify import bench
    from vitrify.bench.table import table
    from vitrify.errors import VitrifyError

    console = Console(stderr=True)
    with console.status("preparing") as status:
        result: Result = bench.run(
            benchmark,
            cases,
            seconds=seconds,
            seed=seed,
            command=_command(benchmark, cases, seconds, seed),
            progress=lambda message: status.update(message) if console.is_terminal else console.print(message),
        )
    Console().print(table(result))
    if output is not None:
        typer.echo(f"written: {result.write(output)}")
    if result.refusals:
        names = ", ".join(sorted({row.contender for row in result.refusals}))
        raise VitrifyError(f"wrong output, or none, from: {names}. The table says which case and why")


def _check_writable(folder: Path) -> None:
    """Find out before the measurement, not after it, that its result cannot be written."""
    from vitrify.errors import InputError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output {folder}: cannot write into this folder: {error.strerror or error}") from error


def _command(benchmark: str, cases: list[dict[str, Any]], seconds: float, seed: int) -> str:
    """Return a command that runs these cases again."""
    first = cases[0]
    if benchmark == "models":
        names = ",".join(f"{case['model']}:{case['image_size']}" for case in cases)
        chosen = f"--models {names} --recipe {shlex.quote(first['recipe'])}"
    else:
        tokens = ",".join(str(case["tokens"]) for case in cases)
        chosen = f"--tokens {tokens} --heads {first['heads']}"
        chosen += f" --head-dim {first['head_dim']} --dtype {first['dtype']}"
    compiled = " --compile" if first["compile"] else ""
    return (
        f"vitrify bench {benchmark} {chosen} --batch-size {first['batch_size']}{compiled} "
        f"--device {first['device']} --seconds {seconds:g} --seed {seed}"
    )


def _whole_number(option: str, text: str) -> int:
    from vitrify.errors import InputError

    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: {text.strip()!r} is not a whole number") from None
