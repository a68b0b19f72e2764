"""Which jobs make which part of a tensor: what a tile that reads the tensor has to wait for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vitrify.accelerator.program import Job

PORTIONS = 8
"""Into how many portions a tensor is cut at most, for those that read it."""


@dataclass
class Grid:
    """A tensor in portions, each with the jobs after which it is there.

    groups    heads of images that are computed apart; 1 for plain rows of tokens
    rows      rows of a group: the tokens of all images if there is one group
    edges     upper ends of a group's portions, as shares of its rows (or of its columns, if `columns`)
    jobs      jobs[group][portion]
    """

    groups: int
    rows: int
    edges: Sequence[float]
    jobs: list[list[tuple[Job, ...]]]
    columns: bool = False

    def everything(self) -> list[Job]:
        """Return the jobs of the whole tensor."""
        return [job for group in self.jobs for portion in group for job in portion]

    def need(self, groups: int, group: int, rows: int, low: float, high: float) -> list[Job]:
        """Return the jobs behind a reader's share low..high of its `rows`, in its `group` of `groups`.

        Where the two sides' shapes do not tell which portions those are, the whole tensor is waited for.
        """
        if self.columns:
            return self.everything()
        if groups == self.groups:
            return self._portions(group, low, high)
        if self.groups == 1 and self.rows % rows == 0:  # heads read rows of all images
            images = self.rows // rows
            image = group * images // groups
            return self._portions(0, (image + low) / images, (image + high) / images)
        if groups == 1 and rows % self.rows == 0 and self.groups % (rows // self.rows) == 0:  # rows read heads
            images = rows // self.rows
            heads = self.groups // images
            found: list[Job] = []
            for image in range(math.floor(low * images), math.ceil(high * images)):
                part = max(low * images - image, 0.0), min(high * images - image, 1.0)
                for head in range(image * heads, (image + 1) * heads):
                    found += self._portions(head, *part)
            return found
        return self.everything()

    def _portions(self, group: int, low: float, high: float) -> list[Job]:
        found: list[Job] = []
        begin = 0.0
        portions = self.jobs[group]
        for portion, end in enumerate(self.edges):
            # Shares are quotients of whole numbers: what differs by rounding only is the same edge.
            if begin < high - 1e-9 and end > low + 1e-9:
                found += portions[portion]
            begin = end
        return found


def cuts(total: int, size: int, most: int | None = None) -> list[tuple[int, int]]:
    """Return ranges of `size` that cover 0..total, the last one shorter; longer ones if there would be over `most`."""
    if most is not None:
        size = max(size, -(-total // most))
    return [(start, min(start + size, total)) for start in range(0, total, size)]
