"""GNT, the generalizable NeRF transformer: a new view from a few posed photographs, by attention alone.

Varma T. et al., "Is Attention All That NeRF Needs?", ICLR 2023. No volume rendering: a view transformer blends what the
source views see of a point, a ray transformer blends the points of a ray, and the mean of its points is its colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from vitrify.errors import InputError
from vitrify.nvs.encoder import FeatureNet
from vitrify.nvs.projection import Samples, sample
from vitrify.nvs.rays import RayBatch, refine, spread
from vitrify.nvs.transformer import Encoding, Mlp, RayTransformer, ViewTransformer


@dataclass(frozen=True)
class Architecture:
    """The numbers that make a GNT; named sets of them are in `nvs.presets`.

    width             of the tokens; a multiple of num_heads, at least 8
    depth             blocks, each a view transformer and a ray transformer
    num_heads         of the ray attention
    squeeze           hidden channels of the view attention's MLPs
    points            on a ray
    fine_points       more points on a ray, placed where a first pass over `points` attends to; 0 for none
    fine_net          the second pass has weights of its own
    frequencies       of the encoding of points and directions
    features          channels of the source images' features
    channels, blocks  of the feature extractor's three stages
    strides           of its stem and first stage; features have 1 / (their product) of the image's resolution
    dropout           everywhere in the transformers; only 0 lets attention be converted to forms without weights

    Raises InputError where a number makes no sense.
    """

    width: int
    depth: int
    num_heads: int
    squeeze: int
    points: int
    fine_points: int
    fine_net: bool
    frequencies: int
    features: int
    channels: tuple[int, int, int]
    blocks: tuple[int, int, int]
    strides: tuple[int, int]
    dropout: float

    def __post_init__(self) -> None:
        for name, lengths in (("channels", 3), ("blocks", 3), ("strides", 2)):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != lengths:
                raise InputError(f"{name} must be {lengths} numbers, not {getattr(self, name)}")
        for name in ("depth", "num_heads", "squeeze", "features", "channels", "blocks", "strides"):
            values = getattr(self, name)
            if min(values if isinstance(values, tuple) else (values,)) < 1:
                raise InputError(f"{name} must be at least 1, not {values}")
        if self.points < 4:
            raise InputError(f"points must be at least 4 on a ray, not {self.points}")
        if self.width < 8 or self.width % self.num_heads:
            raise InputError(f"width must be a multiple of num_heads ({self.num_heads}), at least 8, not {self.width}")
        if self.fine_points < 0 or self.frequencies < 0:
            raise InputError(
                f"fine_points and frequencies must not be negative: {self.fine_points}, {self.frequencies}"
            )
        if self.fine_net and not self.fine_points:
            raise InputError("fine_net=True needs fine_points: a second pass that it could be for")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout}")


class Rendered(NamedTuple):
    """What a model makes of a RayBatch; B target cameras, R rays each.

    rgb       (B, R, 3); the background where no source view sees the ray. Not clamped to [0, 1]
    coverage  (B, R): the share of the ray's points that a source view sees
    depths    (B, R, P): the points' depths
    tokens, encoding  (B * R, P, ...): what the last ray transformer got, for `GNT.depth`
    coarse    (B, R, 3): the colour of the first of two passes; None where there is one
    """

    rgb: Tensor
    coverage: Tensor
    depths: Tensor
    tokens: Tensor
    encoding: Tensor
    coarse: Tensor | None


class Block(nn.Module):
    """A view transformer, which updates each point by what its source views see, and a ray transformer."""

    def __init__(self, shape: Architecture, encoded: int) -> None:
        super().__init__()
        self.view = ViewTransformer(shape.width, shape.squeeze, shape.dropout)
        self.ray = RayTransformer(shape.width, shape.num_heads, encoded, shape.dropout)

    def forward(self, x: Tensor, views: Tensor, samples: Samples, encoding: Tensor) -> Tensor:
        """x (N, P, C), views (N, P, V, C) -> (N, P, C)."""
        x = self.view(x, views, samples.angles, samples.valid)
        out: Tensor = self.ray(x, encoding)
        return out


class RayNet(nn.Module):
    """The transformers: from what the source views see of a ray's points to the ray's colour."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.embed = Mlp(3 + shape.features, shape.width, shape.width)
        self.encoding = Encoding(shape.frequencies)
        encoded = 2 * 3 * (1 + 2 * shape.frequencies)
        # Place and direction enter in every other block.
        self.blocks = nn.ModuleList(Block(shape, encoded if i % 2 == 0 else 0) for i in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.colour = nn.Linear(shape.width, 3)

    def forward(self, samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
        """Return colours (N, 3), and what the last ray transformer got: tokens and encoding (N, P, ...)."""
        towards = self.encoding(samples.towards)[:, None].expand(-1, samples.points.shape[1], -1)
        encoding = torch.cat([self.encoding(samples.points), towards], -1)
        views = self.embed(samples.features)
        x = views.max(2).values
        *others, last = (cast(Block, block) for block in self.blocks)
        for block in others:
            x = block(x, views, samples, encoding)
        tokens: Tensor = last.view(x, views, samples.angles, samples.valid)
        colours: Tensor = self.colour(self.norm(last.ray(tokens, encoding)).mean(1))
        return colours, tokens, encoding

    def weights(self, tokens: Tensor, encoding: Tensor) -> Tensor:
        """Return how much the last ray attention attends to each point, (N, P); see RayAttention."""
        ray = cast(Block, self.blocks[-1]).ray
        return ray.attn.weights(ray.attn_norm(ray.locate(tokens, encoding)))


class GNT(nn.Module):
    """The whole model: encoder and ray networks. `nvs.create` builds the presets.

    >>> model = vitrify.nvs.create("gnt_small")
    >>> model(batch).rgb      # a RayBatch of (B, R) rays -> (B, R, 3)
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        shape = self.architecture = architecture
        own = shape.features if shape.fine_net else 0
        self.encoder = FeatureNet(shape.channels, shape.blocks, shape.strides, shape.features + own)
        self.coarse = RayNet(shape)
        self.fine = RayNet(shape) if shape.fine_net else None

    def forward(self, batch: RayBatch) -> Rendered:
        """Encode the source views and trace the rays."""
        return self.trace(batch, self.encode(batch.images))

    def encode(self, images: Tensor) -> Tensor:
        """Return the features (B, V, C, h, w) of source views (B, V, 3, H, W). Raises InputError for tiny images."""
        maps: Tensor = self.encoder(images.flatten(0, 1))
        return maps.reshape(*images.shape[:2], *maps.shape[1:])

    def trace(self, batch: RayBatch, features: Tensor) -> Rendered:
        """Render the batch's rays from features that are there already. In training, points are drawn at random."""
        shape, size = self.architecture, batch.origins.shape[:2]
        depths = spread(batch.bounds, size[1], shape.points, jitter=self.training)
        samples = sample(batch, features[:, :, : shape.features], depths)
        rgb, tokens, encoding = self.coarse(samples)
        coarse = None
        if shape.fine_points:
            coarse = rgb
            with torch.no_grad():
                weights = self.coarse.weights(tokens, encoding).reshape(*size, -1)
                depths = refine(depths, weights, shape.fine_points, jitter=self.training)
            samples = sample(batch, features[:, :, -shape.features :], depths)
            net = self.coarse if self.fine is None else self.fine
            rgb, tokens, encoding = net(samples)
        coverage = samples.valid.any(-1).to(rgb.dtype).mean(-1).reshape(size)

        def over_background(colours: Tensor) -> Tensor:
            return torch.where(coverage[..., None] > 0, colours.reshape(*size, 3), batch.background[:, None])

        coarse = None if coarse is None else over_background(coarse)
        return Rendered(over_background(rgb), coverage, depths, tokens, encoding, coarse)

    def depth(self, rendered: Rendered) -> Tensor:
        """Return the depth of each ray (B, R): the mean of its points' depths, weighted as the last ray attention.

        Rays that no source view sees have weights, too, but their depth means nothing.
        """
        net = self.coarse if self.fine is None else self.fine
        weights = net.weights(rendered.tokens, rendered.encoding).reshape(rendered.depths.shape)
        return (weights * rendered.depths).sum(-1)

    def example_batch(self) -> RayBatch:
        """Return a batch of meaningless tensors, which shows `convert_` and `workload` the shapes of a call."""
        side, rays, views = 128, 8, 4
        like = self.coarse.norm.weight
        pose = torch.eye(4, device=like.device).expand(1, views, 4, 4)
        ones = torch.ones(1, rays, 3, device=like.device)
        images = like.new_zeros(1, views, 3, side, side)
        bounds = torch.linspace(1, 2, 2, device=like.device)[None]
        return RayBatch(ones, ones, bounds, ones[:, 0], images, pose[..., :3, :3], pose)
