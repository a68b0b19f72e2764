"""`vitrify recipes`: which recipes there are, and what is in each."""

from __future__ import annotations

from typing import Annotated

import typer

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify recipes\n\n"
    "vitrify recipes vitality > my.yaml      (then edit it, and give --recipe my.yaml)"
)


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Print this recipe as YAML.", show_default=False)
    ] = None,
) -> None:
    """List the recipes, or print one as YAML to start your own from."""
    import inspect

    import yaml

    from vitrify import recipes as registry

    if name is not None:
        typer.echo(yaml.safe_dump(registry.get(name).to_dict(), sort_keys=False), nl=False)
        return
    width = max(len(known) for known in registry.names())
    for known in registry.names():
        summary = (inspect.getdoc(getattr(registry, known)) or "").partition("\n")[0]
        typer.echo(f"{known:<{width}}  {summary}")
