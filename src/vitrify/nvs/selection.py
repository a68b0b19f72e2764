"""Which views a new view is made from: those whose cameras are nearest, as in IBRNet and GNT.

Their released code takes the nearest camera centres for forward-facing scenes, and the smallest angles seen from the
scene's centre for NeRF-synthetic. There all cameras are equally far from the centre, so both mean the same views.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from vitrify.errors import InputError
from vitrify.nvs.scene import Scene, check_pose


def nearest_views(scene: Scene, target_pose: Tensor, count: int, exclude: Collection[int] = ()) -> list[int]:
    """Return the indices of the `count` views whose cameras are nearest to the target's, the nearest first.

    A scene that has fewer views gives all it has: the model takes any number from 1 on.

    Args:
        scene: whose views are the candidates.
        target_pose: (4, 4) float32, camera to world.
        count: how many, from 1 on.
        exclude: indices of views that must not be used, such as the target itself.

    Raises:
        InputError: count below 1, a pose that is not rigid, or no view is left.
    """
    if count < 1:
        raise InputError(f"the number of source views must be 1 or more, not {count}")
    check_pose("target", target_pose)
    candidates = [index for index in range(len(scene.views)) if index not in exclude]
    if not candidates:
        raise InputError(f"scene {scene.name!r}: all of its {len(scene.views)} views are excluded, none is left to use")
    centres = torch.stack([scene.views[index].camera_to_world[:3, 3] for index in candidates])
    order = (centres - target_pose[:3, 3]).norm(dim=1).argsort(stable=True)[:count]
    return [candidates[index] for index in order.tolist()]
