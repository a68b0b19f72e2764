"""Which entries sparse attention keeps, as data for the simulators of Sanger and ViTCoD: captured, or synthetic.

`capture.py` reads them off a trained model; what they cost an array is in `packing.py`.

>>> masks = synthetic_masks(["blocks.0.attn", "blocks.1.attn"], heads=3, tokens=197, density=0.25, seed=0)
>>> masks["blocks.0.attn"].shape, round(masks.density, 3)
((1, 3, 197, 197), 0.25)
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vitrify.accelerator.packing import Mask
from vitrify.cost.graph import Workload
from vitrify.errors import InputError, UnsupportedError, unknown
from vitrify.files import write_atomically


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What the heads of one attention module keep, for each image.

    packed   uint8 (images, heads, queries, keys / 8 rounded up): eight entries in a byte, as np.packbits has them
    keys     how many of the last axis's bits count
    """

    packed: npt.NDArray[np.uint8]
    keys: int

    @classmethod
    def of(cls, kept: Mask) -> LayerMask:
        """Pack a bool array (images, heads, queries, keys), True where an entry is kept."""
        return cls(np.packbits(kept, axis=-1), kept.shape[-1])

    @property
    def kept(self) -> Mask:
        """The mask as bool (images, heads, queries, keys)."""
        return np.unpackbits(self.packed, axis=-1, count=self.keys).view(np.bool_)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(images, heads, queries, keys)."""
        images, heads, queries, _ = self.packed.shape
        return images, heads, queries, self.keys

    @property
    def density(self) -> tuple[float, ...]:
        """The kept share of the entries of each head, over all images."""
        return tuple(float(share) for share in self.kept.mean((0, 2, 3)))


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of a model's attention modules, by their qualified names (those of the workload's operations).

    source   "captured: ..." and from what, or "synthetic: ..."; a result that uses them says so
    """

    layers: Mapping[str, LayerMask]
    source: str

    def __getitem__(self, name: str) -> LayerMask:
        if name not in self.layers:
            raise unknown("attention module in the masks", name, self.layers)
        return self.layers[name]

    @property
    def synthetic(self) -> bool:
        """Whether no model was run for them."""
        return self.source.startswith("synthetic")

    @property
    def density(self) -> float:
        """The kept share of all entries."""
        kept = sum(int(np.count_nonzero(layer.kept)) for layer in self.layers.values())
        return kept / sum(math.prod(layer.shape) for layer in self.layers.values())

    def save(self, path: Path) -> None:
        """Write them to an .npz file, whole or not at all; raises InputError for another suffix."""
        if path.suffix != ".npz":
            raise InputError(f"masks are saved as .npz, not {str(path)!r}")
        header = {"source": self.source, "layers": [[name, layer.keys] for name, layer in self.layers.items()]}
        arrays: dict[str, Any] = {str(index): layer.packed for index, layer in enumerate(self.layers.values())}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, header=np.array(json.dumps(header)), **arrays)
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Masks:
        """Read what `save` wrote; raises InputError naming a file that is missing, or no such file."""
        try:
            with np.load(path, allow_pickle=False) as data:
                header = json.loads(str(data["header"]))
                layers = {name: LayerMask(data[str(i)], keys) for i, (name, keys) in enumerate(header["layers"])}
                return cls(layers, header["source"])
        except FileNotFoundError:
            raise InputError(f"masks {str(path)!r} do not exist") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise InputError(f"{str(path)!r} holds no masks that vitrify saved: {error}") from error


def synthetic_masks(layers: Sequence[str], heads: int, tokens: int, density: float, seed: int = 0) -> Masks:
    """Return masks of the shape that attention in ViTs tends to have, for layers of one size; see `synthetic_for`.

    Raises InputError unless 1 / tokens <= density <= 1: every query keeps at least its own token.
    """
    return _synthetic(dict.fromkeys(layers, (heads, tokens, tokens)), density, seed)


def synthetic_for(graph: Workload, density: float, seed: int = 0) -> Masks:
    """Return synthetic masks for every softmax attention of a workload of one image.

    A head looks at its neighbours on the token grid and at a few global tokens, of which the first is the strongest,
    in a proportion of its own; each query keeps its own token. Heads differ in density by up to 60 %, in pairs about
    the one asked for. Not measured on anything: use `capture_masks` where there is a trained model.
    Raises InputError for a density that no mask of these shapes has, UnsupportedError without softmax attention.
    """
    images = graph.input_shape[0]
    shapes = {op.module: (op.count // images, op.m, op.n) for op in graph.operations if op.step == "qk" and op.macs}
    if not shapes:
        raise UnsupportedError(f"{graph.model} has no softmax attention to mask")
    return _synthetic(shapes, density, seed)


def _synthetic(shapes: Mapping[str, tuple[int, int, int]], density: float, seed: int) -> Masks:
    least = max(1 / keys for _, _, keys in shapes.values())
    if not least <= density <= 1:
        raise InputError(f"density must be at least {least:.4g}, each query's own token, and at most 1, not {density}")
    generator = np.random.default_rng(seed)
    layers = {}
    for name, (heads, queries, keys) in shapes.items():
        room = min(0.6, 1 / density - 1, max(1 - 1 / (density * keys), 0))
        pairs = generator.uniform(0, room, heads // 2)
        spread = np.concatenate([1 + pairs, 1 - pairs, np.ones(heads % 2)])
        kept = np.stack([_head(queries, keys, density * factor, generator) for factor in spread])
        layers[name] = LayerMask.of(kept[None])
    return Masks(layers, f"synthetic: neighbours and global tokens, density {density:g}, seed {seed}")


def _head(queries: int, keys: int, density: float, generator: np.random.Generator) -> Mask:
    """Return one head's mask (queries, keys)."""
    places = _grid(queries)[:, None] - _grid(keys)[None]
    reach = generator.uniform(0.05, 0.25)
    near = np.exp(-np.hypot(places[..., 0], places[..., 1]) / reach)
    strength = generator.pareto(2, keys)
    strength[0] = strength.max()
    share = generator.uniform()
    score = (1 - share) * near + share * strength / strength.max() + generator.uniform(0, 0.3, near.shape)
    score[np.arange(queries), np.arange(queries) * keys // queries] = np.inf
    keep = max(round(density * score.size), queries)
    kept = np.zeros(score.size, np.bool_)
    kept[np.argpartition(score.ravel(), -keep)[-keep:]] = True
    return kept.reshape(score.shape)


def _grid(tokens: int) -> npt.NDArray[np.float64]:
    """Return each token's place (y, x) on a square grid of side 1, row by row: (tokens, 2)."""
    side = math.isqrt(tokens - 1) + 1
    return np.stack(np.divmod(np.arange(tokens), side), -1) / side
