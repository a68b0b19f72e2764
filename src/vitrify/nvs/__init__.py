"""Novel view synthesis with GNT: a new view of a scene from a few posed photographs, by attention alone.

>>> model = create("gnt_small")
>>> conversion = vitrify.convert_(model, vitrify.recipes.taylor())
>>> picture = render(model, scene, pose, sources).rgb
"""

from vitrify.nvs import adapters
from vitrify.nvs.model import GNT, Architecture, Rendered
from vitrify.nvs.presets import PRESETS, create
from vitrify.nvs.rays import RayBatch, pixel_rays
from vitrify.nvs.render import Rendering, novel_view, render, source_features
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.selection import nearest_views
from vitrify.nvs.task import RayDataset, RenderTask

adapters.register()

__all__ = [
    "GNT",
    "PRESETS",
    "Architecture",
    "RayBatch",
    "RayDataset",
    "RenderTask",
    "Rendered",
    "Rendering",
    "Scene",
    "View",
    "create",
    "nearest_views",
    "novel_view",
    "pixel_rays",
    "render",
    "source_features",
]
