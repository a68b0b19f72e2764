"""Learning to render: random rays of random views, from the views around them, for the one trainer of `vitrify.train`.

>>> task = RenderTask(config, RayDataset(scenes, rays=512), RayDataset(held_out, rays=2048, train=False))
>>> finetune(model, task, config, "runs/gnt")
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from vitrify.errors import InputError
from vitrify.nvs.model import Rendered
from vitrify.nvs.rays import RayBatch, pixel_rays
from vitrify.nvs.scene import Scene, View
from vitrify.nvs.selection import nearest_views
from vitrify.train.config import TrainConfig
from vitrify.train.tasks import Logs, Task

Item = tuple[RayBatch, Tensor]


class RayDataset(Dataset[Item]):
    """Items are (rays, colours): a RayBatch of one target camera without the batch's dimension, and colours (R, 3).

    scenes   what to render; images are read once and kept
    rays     of each item. In training random pixels, else evenly spread ones, the same each time
    sources  source views of each item, never the target; all others in a scene that has fewer. In training drawn from
             one to three times as many near ones (IBRNet), else the nearest
    targets  indices of the views to render in each scene, from the others alone. By default each view is rendered from
             all others
    repeats  how often each view comes up in an epoch
    train    whether to draw at random
    recolour in training, give each item channels in another order, inverted or not, each darker by up to 30 %, the same
             in all its views: what a model learns on a few scenes then fits other colours

    Raises InputError for images of several sizes in a scene, targets that a scene lacks, a scene that has no view left
    to render them from, and rays, sources or repeats below 1.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        rays: int,
        sources: int = 8,
        *,
        targets: Collection[int] | None = None,
        repeats: int = 1,
        train: bool = True,
        recolour: bool = False,
    ) -> None:
        for name, count in (("rays", rays), ("sources", sources), ("repeats", repeats)):
            if count < 1:
                raise InputError(f"{name} must be at least 1, not {count}")
        self._recolour = recolour and train
        self.scenes = [scene.in_memory() for scene in scenes]
        self.rays, self.sources, self.repeats, self.train = rays, sources, repeats, train
        self._hidden = frozenset(targets or ())
        for scene in self.scenes:
            _check(scene, self._hidden)
        self._targets = [
            (number, index)
            for number, scene in enumerate(self.scenes)
            for index in (range(len(scene.views)) if targets is None else targets)
        ]
        if not self._targets:
            raise InputError("there is nothing to render: give scenes, and targets that are not empty")

    @property
    def source(self) -> str:
        """Which data these are: scenes, views, and how many rays."""
        names = ", ".join(scene.name for scene in self.scenes)
        changed = ", recoloured" if self._recolour else ""
        return f"{len(self._targets)} views of {names}; {self.rays} rays from {self.sources} source views{changed}"

    def __len__(self) -> int:
        return len(self._targets) * self.repeats

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, target = self._targets[index % len(self._targets)]
        scene = self.scenes[number]
        view = scene.views[target]
        total = view.height * view.width
        pixels = torch.randint(total, (self.rays,)) if self.train else torch.arange(self.rays) * total // self.rays
        colours = view.rgb().flatten(1)[:, pixels].mT
        batch = ray_batch(scene, view, self._choose(scene, target), pixels)
        return recoloured(batch, colours) if self._recolour else (batch, colours)

    def _choose(self, scene: Scene, target: int) -> list[int]:
        pose = scene.views[target].camera_to_world
        hidden = {target, *self._hidden}
        if not self.train:
            return nearest_views(scene, pose, self.sources, exclude=hidden)
        factor = 1 + 2 * torch.rand(()).item()
        pool = nearest_views(scene, pose, max(self.sources, round(self.sources * factor)), exclude=hidden)
        return [pool[i] for i in torch.randperm(len(pool))[: self.sources].tolist()]


def _check(scene: Scene, targets: Collection[int]) -> None:
    count = len(scene.views)
    if len({(view.height, view.width) for view in scene.views}) > 1:
        raise InputError(f"scene {scene.name!r} has images of several sizes: shrink or crop them to one")
    if wrong := [index for index in targets if not 0 <= index < count]:
        raise InputError(f"scene {scene.name!r} has views 0 to {count - 1}: {wrong[0]} cannot be a target")
    if count <= max(1, len(targets)):
        raise InputError(f"scene {scene.name!r} has {count} views: none is left to render a target from")


def ray_batch(scene: Scene, target: View, sources: Sequence[int], pixels: Tensor | None = None) -> RayBatch:
    """Return the rays of a view (of all its pixels, or of some) and its source views, without the batch's dimension.

    Raises as `source_images`.
    """
    images = source_images(scene, sources)
    origins, directions = pixel_rays(target.intrinsics, target.camera_to_world, target.height, target.width, pixels)
    views = [scene.views[i] for i in sources]
    return RayBatch(
        origins=origins,
        directions=directions,
        bounds=torch.tensor([scene.near, scene.far], dtype=torch.float32),
        background=scene.background,
        images=images,
        intrinsics=torch.stack([view.intrinsics for view in views]),
        camera_to_world=torch.stack([view.camera_to_world for view in views]),
    )


def recoloured(batch: RayBatch, colours: Tensor) -> Item:
    """Return the same rays and views in other colours, drawn at random; see RayDataset."""
    order, inverted, gain = torch.randperm(3), torch.rand(3) < 0.5, 1 - 0.3 * torch.rand(3)

    def change(x: Tensor) -> Tensor:
        return torch.where(inverted, 1 - x[..., order], x[..., order]) * gain

    images = change(batch.images.movedim(-3, -1)).movedim(-1, -3).contiguous()
    return batch._replace(images=images, background=change(batch.background)), change(colours)


def source_images(scene: Scene, sources: Sequence[int]) -> Tensor:
    """Return the pictures (V, 3, H, W) of the views with these indices.

    Raises InputError if there is none, for an index that the scene lacks, and for pictures of several sizes.
    """
    if not sources:
        raise InputError(f"scene {scene.name!r}: a view is rendered from at least one source view, but none is given")
    if wrong := [index for index in sources if not 0 <= index < len(scene.views)]:
        raise InputError(f"scene {scene.name!r} has views 0 to {len(scene.views) - 1}, not {wrong[0]}")
    sizes = {(view.width, view.height) for view in (scene.views[index] for index in sources)}
    if len(sizes) > 1:
        listed = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise InputError(f"scene {scene.name!r}: source views must have one size, not {listed}")
    return torch.stack([scene.views[index].rgb() for index in sources])


class RenderTask(Task):
    """Colours of rays. loss = mean squared error over rays that a source view sees; that of the first pass is added.

    With `config.objective` "distill", the share `distill_alpha` of the error is measured against the colours that the
    unconverted model renders. Raises InputError for the other settings of the config that have no meaning here.
    """

    def __init__(self, config: TrainConfig, train_dataset: RayDataset, eval_dataset: RayDataset | None = None) -> None:
        if config.objective == "features" or config.distill_features_weight:
            raise InputError("rendering has no feature loss: use objective 'labels' or 'distill' without it")
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.needs_teacher = config.objective == "distill"
        self._alpha = config.distill_alpha if self.needs_teacher else 0.0

    def loss(self, model: nn.Module, batch: Item, teacher: nn.Module | None) -> tuple[Tensor, Logs]:
        """Return the error; "psnr" (dB, of the whole batch) is logged beside it."""
        rays, colours = batch
        out: Rendered = model(rays)
        loss = squared_error(out, colours)
        logs = {"psnr": psnr(loss.detach())}
        if teacher is not None and self._alpha:
            with torch.no_grad():
                wanted = teacher(rays).rgb
            taught = squared_error(out, wanted)
            logs["teacher_psnr"] = psnr(taught.detach())
            loss = (1 - self._alpha) * loss + self._alpha * taught
        if out.coarse is not None:
            loss = loss + squared_error(out._replace(rgb=out.coarse), colours)
        return loss, {"loss": loss.detach(), **logs}

    def measure(self, model: nn.Module, batch: Item, teacher: nn.Module | None) -> Logs:
        """Return "psnr" (dB) and "mse" of each view, over all of its rays, colours clamped to [0, 1]."""
        rays, colours = batch
        error = (model(rays).rgb.float().clamp(0, 1) - colours).square().mean((1, 2))
        return {"psnr": psnr(error), "mse": error}


def squared_error(out: Rendered, colours: Tensor) -> Tensor:
    """Return the mean squared error over the rays that a source view sees; 0 if there is none."""
    seen = (out.coverage > 0).to(colours.dtype)[..., None]
    return ((out.rgb.float() - colours).square() * seen).sum() / (3 * seen.sum()).clamp(min=1)


def psnr(mse: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of colours in [0, 1]; at most 100."""
    return -10 * mse.clamp(min=1e-10).log10()
