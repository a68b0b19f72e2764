"""`vitrify bench`: measure operators, or whole models, against what they replace; what fails its check is not timed."""

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
    help="Measure operators, or whole models, against what they replace. Wrong outputs are refused, not timed.",
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
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


@app.command(epilog="[bold]Example[/bold]\n\nvitrify bench attention --tokens 197,1025 --output benchmarks/results")
def attention(
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, separated by commas.")] = "197,577,1025,4096,16384",
    heads: Annotated[int, options.at_least(1, "Attention heads.")] = 12,
    head_dim: Annotated[int, options.at_least(1, "Width of one head.")] = 64,
    batch_size: BatchOption = 1,
    dtype: DtypeOption = "float32",
    backward: Annotated[
        bool, typer.Option("--backward", help="Time forward and backward together; the gradients are checked.")
    ] = False,
    compile: CompileOption = False,
    device: options.DeviceOption = "auto",
    seconds: SecondsOption = 10.0,
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Time the attention core: PyTorch's fused softmax attention (SDPA) against Taylor attention.

    On contiguous inputs and on the strides of timm's packed projection; on a GPU with SDPA's flash and cuDNN kernels by
    themselves too. Shows speed-up, peak memory, and the floor that this machine's bandwidth and arithmetic set.
    """
    fixed = {
        "heads": heads,
        "head_dim": head_dim,
        "batch_size": batch_size,
        "dtype": dtype,
        "backward": backward,
        "compile": compile,
        "device": str(options.pick_device(device)),
    }
    cases = [{"tokens": _whole_number("--tokens", count), **fixed} for count in tokens.split(",")]
    _run("attention", cases, seconds=seconds, seed=seed, output=output)


@app.command(epilog="[bold]Example[/bold]\n\nvitrify bench shift --shapes 197x768x3072,1x768x3072 --dtype bfloat16")
def shift(
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxINxOUT,...",
            help="Shapes of the layer.",
            show_default="MLPs of ViT and PVTv2; on a CPU, nine of them",
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    compile: CompileOption = False,
    device: options.DeviceOption = "auto",
    seconds: SecondsOption = 1.0,
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Time a shift layer: F.linear against 4-bit codes, with float, int8 and float8 activations.

    Beside them torch's own INT8 and FP8 products and 4-bit integer weights, where this machine has them.
    """
    from vitrify.bench.shift import FULL, QUICK

    where = str(options.pick_device(device))
    chosen = _shapes("--shapes", shapes, 3) if shapes else (FULL if where.startswith("cuda") else QUICK)
    fixed = {"dtype": dtype, "compile": compile, "device": where}
    cases = [{"rows": rows, "inputs": inputs, "outputs": outputs, **fixed} for rows, inputs, outputs in chosen]
    _run("shift", cases, seconds=seconds, seed=seed, output=output)


@app.command(epilog="[bold]Example[/bold]\n\nvitrify bench hamming --shapes 1x3x197x64x64 --dtype bfloat16")
def hamming(
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="BxHxNxDxC,...",
            help="Batch, heads, tokens, width of the values, width of the codes.",
            show_default="the three of ShiftAddViT's kernel benchmark",
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    compile: CompileOption = False,
    device: options.DeviceOption = "auto",
    seconds: SecondsOption = 2.0,
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Time attention among binary codes: the op against matrix products of the codes, masked sums, and SDPA."""
    from vitrify.bench.hamming import SHAPES, SIZES

    fixed = {"dtype": dtype, "compile": compile, "device": str(options.pick_device(device))}
    chosen = _shapes("--shapes", shapes, 5) if shapes else SHAPES
    cases = [{**dict(zip(SIZES, shape, strict=True)), **fixed} for shape in chosen]
    _run("hamming", cases, seconds=seconds, seed=seed, output=output)


@app.command(epilog="[bold]Example[/bold]\n\nvitrify bench mixture --shapes 12608x768x3072:0.4 --dtype bfloat16")
def mixture(
    shapes: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxINxOUT:SHARE,...",
            help="Shapes of the layer, each with the share of the tokens that multiply.",
            show_default="MLPs of ViT at shares from 0 to 1; on a CPU, eight of them",
        ),
    ] = None,
    dtype: DtypeOption = "float32",
    compile: CompileOption = False,
    device: options.DeviceOption = "auto",
    seconds: SecondsOption = 1.0,
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Time a mixture of a multiplying and a shifting layer against multiplying every token.

    Beside it the ways without a kernel: both layers on all tokens, and one product for each.
    """
    from vitrify.bench.mixture import FULL, QUICK

    where = str(options.pick_device(device))
    chosen = _shared("--shapes", shapes) if shapes else (FULL if where.startswith("cuda") else QUICK)
    names = ("rows", "inputs", "outputs", "multiply")
    fixed = {"dtype": dtype, "compile": compile, "device": where}
    cases = [{**dict(zip(names, shape, strict=True)), **fixed} for shape in chosen]
    _run("mixture", cases, seconds=seconds, seed=seed, output=output)


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
    runtimes: Annotated[
        bool,
        typer.Option("--runtimes", help="Add bfloat16, torch's dynamic INT8, ONNX Runtime (float32, INT8), OpenVINO."),
    ] = False,
    device: options.DeviceOption = "auto",
    seconds: SecondsOption = 20.0,
    seed: SeedOption = 0,
    output: OutputOption = None,
) -> None:
    """Time whole models, the original against its conversion, with random weights and images.

    The original must equal its own conversion with the softmax recipe; every converted attention and every shift layer
    (packed) its float64 value.
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
                "runtimes": runtimes,
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
        chosen = f"--models {names} --recipe {shlex.quote(first['recipe'])} --batch-size {first['batch_size']}"
    elif benchmark == "attention":
        tokens = ",".join(str(case["tokens"]) for case in cases)
        chosen = f"--tokens {tokens} --heads {first['heads']} --head-dim {first['head_dim']} --dtype {first['dtype']}"
        chosen += f" --batch-size {first['batch_size']}"
    else:
        sizes = ("x".join(str(size) for size in case.values() if type(size) is int) for case in cases)
        shapes = (
            f"{size}:{case['multiply']:g}" if "multiply" in case else size
            for size, case in zip(sizes, cases, strict=True)
        )
        chosen = f"--shapes {','.join(shapes)} --dtype {first['dtype']}"
    flags = "".join(f" --{flag}" for flag in ("backward", "compile", "runtimes") if first.get(flag))
    return f"vitrify bench {benchmark} {chosen}{flags} --device {first['device']} --seconds {seconds:g} --seed {seed}"


def _shapes(option: str, text: str, sizes: int) -> list[tuple[int, ...]]:
    from vitrify.errors import InputError

    shapes = [tuple(_whole_number(option, size) for size in entry.split("x")) for entry in text.split(",")]
    for shape in shapes:
        if len(shape) != sizes:
            raise InputError(f"{option}: each shape has {sizes} sizes with x between, not {'x'.join(map(str, shape))}")
    return shapes


def _shared(option: str, text: str) -> list[tuple[float, ...]]:
    from vitrify.errors import InputError

    shapes: list[tuple[float, ...]] = []
    for entry in text.split(","):
        size, _, share = entry.partition(":")
        try:
            shapes.append((*_shapes(option, size, 3)[0], float(share)))
        except ValueError:
            raise InputError(
                f"{option}: each shape is ROWSxINxOUT:SHARE, such as 197x768x3072:0.4, not {entry!r}"
            ) from None
    return shapes


def _whole_number(option: str, text: str) -> int:
    from vitrify.errors import InputError

    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: {text.strip()!r} is not a whole number") from None
