"""Scenes from folders, whatever their format, and the scenes that ship."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from vitrify.errors import InputError, unknown
from vitrify.nvs import blender, colmap, llff
from vitrify.nvs.scene import Scene

Split = Literal["train", "held_out"]
_SHIPPED = Path(__file__).parent / "scenes"
# LLFF's loader scales scenes so that the nearest point is at 1 / 0.75; NeRF, IBRNet and GNT kept that.
_NEAR = 4 / 3
_LEAST_ACROSS = 1e-3
# IBRNet and GNT sample rays a little beyond the depths of the points that COLMAP found.
_NEARER, _FARTHER = 0.9, 1.6
_EVERY = 8


def load_scene(source: str | Path, *, shrink: int = 1) -> Scene:
    """Read a scene: LLFF (poses_bounds.npy), NeRF-synthetic (transforms.json), or COLMAP (cameras.txt or .bin).

    COLMAP's model may lie in the folder itself, in sparse/0 or in sparse, with the photographs in images/. Where a
    folder has several, they are looked for in the order above. Forward-facing scenes are brought into one frame, see
    `normalised`. Near and far are as in IBRNet and GNT: of NeRF-synthetic the file's; else 0.9 times the nearest and
    1.6 times the farthest depth that the reader found.

    Args:
        source: the folder of the scene, or the name of a shipped one.
        shrink: so many times fewer pixels in either direction.

    Raises:
        InputError: no scene is found, or it is damaged; see the formats' readers.
    """
    folder = Path(source)
    if not folder.exists() and len(folder.parts) == 1:
        shipped = {path.name: path for split in get_args(Split) for path in _shipped(split)}
        if str(source) not in shipped:
            raise InputError(f"{unknown('scene', str(source), shipped)}; and there is no folder of that name here")
        folder = shipped[str(source)]
    if not folder.is_dir():
        raise InputError(f"the scene {folder} {'is a file, not a folder' if folder.exists() else 'does not exist'}")
    if (folder / llff.FILE).is_file():
        return _widened(normalised(llff.load_llff(folder, shrink)))
    if any((folder / name).is_file() for name in blender.FILES):
        return normalised(blender.load_blender(folder).shrunk(shrink))
    if (model := colmap.find_model(folder)) is not None:
        return _widened(normalised(colmap.load_colmap(folder, model).shrunk(shrink)))
    raise InputError(
        f"{folder} is no scene: it has neither {llff.FILE} (LLFF) nor {blender.FILES[0]} (NeRF-synthetic) nor a COLMAP "
        "model (cameras.txt or cameras.bin, there or in sparse/0)"
    )


def shipped_scenes(split: Split) -> list[Scene]:
    """Return the scenes that ship, to train on ("train") or to test what was never seen ("held_out").

    30 views of 96 x 72 pixels each, rendered by Mitsuba 3 (tools/render_scenes.py). Raises InputError for another
    split.
    """
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    return [load_scene(folder) for folder in _shipped(split)]


def held_out_views(scene: Scene) -> list[int]:
    """Return the indices of the views that are for testing: those called test/..., else every eighth, as in LLFF."""
    named = [index for index, view in enumerate(scene.views) if view.name.removeprefix("./").startswith("test/")]
    return named or list(range(0, len(scene.views), _EVERY))


def normalised(scene: Scene) -> Scene:
    """Bring a forward-facing scene into the frame of its mean camera, in units that put `near` at 4/3 (LLFF's loader).

    Models see places in the world, so that they learn and render in one frame. A scene with cameras that look away
    from their mean direction by 90 degrees or more, such as NeRF's synthetic ones, is returned as it is.
    """
    poses = torch.stack([view.camera_to_world for view in scene.views]).double()
    forward = F.normalize(poses[:, :3, 2].mean(0), dim=0)
    if not (poses[:, :3, 2] @ forward > 0).all():
        return scene
    across = torch.linalg.cross(poses[:, :3, 1].mean(0), forward)
    if across.norm() < _LEAST_ACROSS:  # the cameras' ups cancel out, such as upright and upside down
        across = torch.linalg.cross(poses[0, :3, 1], forward)
    right = F.normalize(across, dim=0)
    mean = torch.eye(4, dtype=torch.float64)
    mean[:3] = torch.stack([right, torch.linalg.cross(forward, right), forward, poses[:, :3, 3].mean(0)], 1)
    scale = _NEAR / scene.near
    moved = torch.linalg.inv(mean) @ poses
    moved[:, :3, 3] *= scale
    views = tuple(replace(view, camera_to_world=pose.float()) for view, pose in zip(scene.views, moved, strict=True))
    return replace(scene, views=views, near=_NEAR, far=scene.far * scale)


def _widened(scene: Scene) -> Scene:
    """Return the scene with the near and far of IBRNet's loaders."""
    return replace(scene, near=_NEARER * scene.near, far=_FARTHER * scene.far)


def _shipped(split: Split) -> list[Path]:
    return sorted(path.parent for path in (_SHIPPED / split).glob("*/transforms.json"))
