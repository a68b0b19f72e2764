"""`vitrify nvs render`: a fly-through of a scene, as PNGs, depth maps and a GIF."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrify.cli import options
from vitrify.cli.nvs import shared

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "vitrify nvs render gnt_small --scene still_life --output runs/fly\n\n"
    "vitrify nvs render runs/taylor --scene ./fern --shrink 8 --frames 120 --output runs/fern-fly\n\n"
    "[bold]Writes[/bold] rgb/000.png ..., depth/000.png ... (16-bit grey: inverse depth, white at the scene's near, "
    "black at its far) and fly-through.gif, colours beside depth. What no photograph shows gets the scene's background "
    "colour.\n\n"
    "[bold]Interrupted?[/bold] The same command goes on: frames that are there are not rendered again."
)


def render(
    model: shared.ModelArgument,
    scene: Annotated[str, typer.Option(help=shared.SCENE_HELP, show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the pictures.")],
    frames: Annotated[int, options.at_least(1, "Frames of the fly-through.")] = 48,
    sources: shared.SourcesOption = 8,
    shrink: shared.ShrinkOption = 1,
    chunk: shared.ChunkOption = 1024,
    device: options.DeviceOption = "auto",
) -> None:
    """Fly through a scene, along a smooth closed path around its cameras."""
    from vitrify.files import write_atomically
    from vitrify.nvs import nearest_views, novel_view, pictures
    from vitrify.nvs import render as render_view
    from vitrify.nvs.evaluate import claim
    from vitrify.nvs.paths import fly_through
    from vitrify.train.run_folder import fingerprint

    target = options.pick_device(device)
    place = shared.load_scenes([scene], shrink, None)[0]
    gnt = shared.load_gnt(model)
    poses = fly_through(place, frames)
    settings = {"weights": fingerprint(gnt), "scene": scene, "frames": frames}
    claim(output, {"command": "nvs render", **settings, "sources": sources, "shrink": shrink})
    gnt = gnt.to(target)
    if sources > len(place.views):
        typer.echo(f"{len(place.views)} source views instead of {sources}: scene {scene!r} has no more", err=True)
    # The depth map is written first: a frame is done when its colours are there.
    files = [(output / "rgb" / f"{i:03}.png", output / "depth" / f"{i:03}.png") for i in range(frames)]
    left = [i for i in range(frames) if not files[i][0].is_file()]
    if left:
        place = place.in_memory()
    with shared.interruptible(output), shared.ray_bar(len(left)) as advance:
        for i in left:
            camera = novel_view(place.views[0], poses[i])
            chosen = nearest_views(place, poses[i], sources)
            out = render_view(gnt, place, camera, chosen, chunk=chunk, progress=advance)
            write_atomically(files[i][1], pictures.png(pictures.depth_map(out.depth, place)))
            write_atomically(files[i][0], pictures.png(out.rgb))
    shown = [pictures.side_by_side(*(pictures.read_png(file) for file in pair)) for pair in files]
    write_atomically(output / "fly-through.gif", pictures.gif(shown))
    typer.echo(f"{frames} frames, {len(left)} of them rendered now: {output / 'fly-through.gif'}")
