"""`vitrify probe`: this machine as a target file, for the latency model and the advisor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrify.cli import options

EPILOG = (
    "[bold]Example[/bold]\n\nvitrify probe --output here.yaml\n\n"
    "vitrify explain deit_tiny_patch16_224 --target here.yaml\n\n"
    "What a probe of seconds cannot find out, the part of its peaks that each kind of kernel reaches, comes from the "
    "target that the file extends; the file may name it anew."
)


def probe(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it here; by default it is printed.")
    ] = None,
    device: options.DeviceOption = "auto",
    threads: Annotated[int | None, options.at_least(1, "CPU threads. Default: as many as torch takes.")] = None,
) -> None:
    """Measure what this machine reaches: matmuls by dtype, memory, calls. The result is a file for --target.

    Keep the machine idle: what else runs is measured along with it.
    """
    import torch
    import yaml

    from vitrify.bench.machine import describe
    from vitrify.cost.probe import measure
    from vitrify.errors import InputError
    from vitrify.files import write_atomically

    where = options.pick_device(device)
    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise InputError(f"--output {output}: a target file ends in .yaml or .yml")
    options.check_writable("--output", output)
    if threads is not None:
        torch.set_num_threads(threads)
    machine = describe(where)
    data = measure(where, title=f"{machine}", machine=machine.slug)
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(output, text)
        typer.echo(f"written: {output}")
