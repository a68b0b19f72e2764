"""What the nvs commands share: which model, which scenes, and the progress of rays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrify.cli import options
from vitrify.errors import InputError

if TYPE_CHECKING:
    from vitrify.nvs import GNT, Scene
    from vitrify.nvs.render import Progress

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="gnt_small or gnt_small-RECIPE (trained, shipped), the folder of an artefact or of a finished run, or a "
        ".pth file that GNT's authors released.",
        show_default=False,
    ),
]
SourcesOption = Annotated[int, options.at_least(1, "Source views, the nearest; fewer where a scene has fewer.")]
ChunkOption = Annotated[int, options.at_least(1, "Rays at a time: more need more memory.")]
ShrinkOption = Annotated[int, options.at_least(1, "So many times fewer pixels in either direction.")]
SCENE_HELP = (
    "A shipped scene's name (still_life) or a folder: LLFF (poses_bounds.npy), NeRF-synthetic (transforms.json) or "
    "COLMAP (sparse/0)."
)


def load_gnt(spec: str) -> GNT:
    """Return the trained model that MODEL means, in eval mode. InputError where it is none."""
    from vitrify.artefact import load
    from vitrify.nvs import GNT, released
    from vitrify.nvs.shipped import shipped_models

    shipped = shipped_models()
    if spec in shipped:
        model = load(shipped[spec])
    elif (folder := options.artefact_at(spec)) is not None:
        model = load(folder)
    elif Path(spec).suffix in (".pth", ".pt"):
        model = released.load(spec)
    else:
        raise InputError(
            f"there is no trained GNT {spec!r}: give the folder of an artefact or of a finished run, a released .pth "
            f"file, or one that ships: {', '.join(shipped) or 'none does'}"
        )
    if not isinstance(model, GNT):
        raise InputError(f"{spec} is a {type(model).__name__}, not a GNT")
    return model.eval()


def load_scenes(names: Sequence[str] | None, shrink: int, default: Any) -> list[Scene]:
    """Return the scenes of these names and folders; without any, the shipped ones of the split `default`."""
    from vitrify.nvs.scenes_io import load_scene, shipped_scenes

    if not names:
        return [scene.shrunk(shrink) for scene in shipped_scenes(default)]
    scenes = [load_scene(name, shrink=shrink) for name in names]
    known = [scene.name for scene in scenes]
    if twice := next((name for name in known if known.count(name) > 1), None):
        raise InputError(f"two scenes are called {twice!r}: their pictures would lie in one folder")
    return scenes


@contextmanager
def interruptible(output: Path) -> Iterator[None]:
    """Turn Ctrl-C into exit code 130, and say that the work can be gone on with."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        typer.echo(f"\n{interruption or 'interrupted'}\nthe same command goes on from {output}", err=True)
        raise typer.Exit(130) from None


@contextmanager
def ray_bar(pictures: int) -> Iterator[Progress]:
    """Show a progress bar of all rays of so many pictures on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    done_of = TextColumn("{task.completed:.1f} of {task.total} pictures")
    columns = (TextColumn("rendering"), BarColumn(), done_of, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=pictures)
        done = 0

        def advance(rays: int, total: int) -> None:
            nonlocal done
            bar.update(task, completed=done + rays / total)
            done += rays == total

        yield advance
