"""What stands in each scene. A design takes a Stage and puts shapes near (0, 0, 0.7), where the cameras look."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from meshes import cone, hills, torus_knot, vase
from stage import Stage
from textures import bricks, cells, checker, clouds, dots, marble, poster, stripes, wood


def market(stage: Stage) -> None:
    """Vases and fruit on a wooden table."""
    rng = stage.rng
    stage.floor(stage.matt(checker, 3))
    stage.wall(2.2, stage.matt(bricks, (4, 1)))
    stage.box([0, 0.2, 0.35], [3.0, 1.8, 0.1], stage.matt(wood))
    for x, y in ((-1.0, 0.6), (-0.2, 0.75), (0.75, 0.6), (-0.55, -0.1)):
        stage.mesh(vase(rng, rng.uniform(0.6, 1.1), rng.uniform(0.22, 0.32)), [x, y, 0.4], stage.glossy())
    for x, y in ((0.1, -0.2), (0.4, -0.45), (1.0, -0.15), (-0.15, -0.5), (-1.1, -0.3)):
        radius = rng.uniform(0.12, 0.2)
        stage.ball([x, y, 0.4 + radius], radius, stage.plain())
    stage.ball([0.6, 0.15, 0.62], 0.22, stage.metal())


def colonnade(stage: Stage) -> None:
    """Three rows of columns, which hide one another."""
    stage.floor(stage.matt(cells, 4))
    stage.wall(2.6, stage.matt(poster, (4, 1)))
    for row, y in enumerate((-0.8, 0.4, 1.6)):
        for index in range(3):
            x = (index - 1) * 1.15 + 0.35 * (row % 2)
            material = stage.metal((0.9, 0.75, 0.45), 0.12) if (row, index) == (1, 1) else stage.matt(repeat=1.5)
            stage.column([x, y, 0.12], 0.2, stage.rng.uniform(1.0, 1.7), material)
            stage.box([x, y, 0.06], [0.6, 0.6, 0.12], stage.matt(marble))
    stage.ball([-0.55, -0.35, 0.25], 0.25, stage.metal(roughness=0.01))


def playroom(stage: Stage) -> None:
    """Stacked cubes, cones and balls in the corner of a room."""
    rng = stage.rng
    stage.floor(stage.matt(wood, 3))
    stage.wall(1.9, stage.matt(dots, (4, 1)))
    stage.wall(0.0, stage.matt(stripes, (2, 1)), x=2.6, turn=-65, width=8)
    for x, y, z, size in ((-0.9, 0.5, 0, 0.7), (-0.2, 0.7, 0, 0.6), (-0.6, 0.6, 0.7, 0.5), (0.7, 0.9, 0, 0.8)):
        stage.box([x, y, z + size / 2], [size] * 3, stage.glossy(), turn=rng.uniform(0, 90))
    stage.mesh(cone(0.9, 0.35), [0.25, -0.1, 0], stage.glossy(stripes))
    stage.mesh(cone(0.6, 0.25), [-1.2, -0.5, 0], stage.glossy(checker))
    stage.ball([0.85, -0.3, 0.35], 0.35, stage.glossy(dots, 0.05))
    stage.ball([-0.45, -0.6, 0.25], 0.25, stage.metal((0.95, 0.6, 0.5)))
    stage.ball([0.7, 0.9, 1.05], 0.25, stage.matt())


def bubbles(stage: Stage) -> None:
    """Balls that float before a wall, large and small, near and far."""
    rng = stage.rng
    stage.floor(stage.matt(clouds, 2))
    stage.wall(2.4, stage.matt(cells, (6, 2)))
    placed: list[np.ndarray] = []
    while len(placed) < 13:
        ball = rng.uniform([-1.5, -0.9, 0.25, 0.15], [1.5, 1.5, 1.7, 0.36])
        if all(np.linalg.norm(ball[:3] - other[:3]) > ball[3] + other[3] + 0.03 for other in placed):
            placed.append(ball)
    for index, (x, y, z, radius) in enumerate(placed):
        material = stage.metal(roughness=0.01 if index else 0.15) if index in {0, 5} else stage.glossy()
        stage.ball([x, y, z], radius, material)


def knot(stage: Stage) -> None:
    """A golden knot on a pedestal, rings around it."""
    rng = stage.rng
    stage.floor(stage.matt(marble, 2))
    stage.wall(2.0, stage.matt(stripes, (4, 1)))
    stage.box([0, 0.2, 0.3], [0.9, 0.9, 0.6], stage.matt(poster), turn=25)
    stage.mesh(torus_knot(2, 3, 0.42, 0.12), [0, 0.2, 1.1], stage.metal((1.0, 0.78, 0.35), 0.18), tilt=70)
    for x, y, radius in ((-1.1, 0.3, 0.4), (1.15, 0.1, 0.35), (0.6, -0.8, 0.25), (-0.7, -0.7, 0.3)):
        material = stage.glossy()
        stage.mesh(torus_knot(1, 0, radius, 0.1), [x, y, radius + 0.1], material, turn=rng.uniform(-50, 50), tilt=90)


def valley(stage: Stage) -> None:
    """Hills with trees, and a lake that mirrors them."""
    rng = stage.rng
    land, foot = hills(rng, 7.0, 1.5), [0, 1.6, -0.5]
    stage.mesh(land, foot, stage.matt(clouds, 0.7))
    stage.floor(stage.metal((0.55, 0.7, 0.8), 0.01), level=-0.05)
    stage.wall(4.8, stage.matt(clouds, (2, 1)))
    ground = land.points + foot
    inside = ground[(np.abs(ground[:, 0]) < 1.7) & (np.abs(ground[:, 1] - 0.6) < 1.6) & (ground[:, 2] > 0)]
    for x, y, z in inside[rng.choice(len(inside), 14, replace=False)]:
        height = rng.uniform(0.45, 0.8)
        stage.column([x, y, z - 0.1], 0.05, 0.3, stage.matt(wood))
        stage.mesh(cone(height, height * 0.36), [x, y, z + 0.15], stage.matt(rng.choice([dots, stripes, checker])))


def stairs(stage: Stage) -> None:
    """Steps with carpets, balls on them, banisters before them."""
    rng = stage.rng
    stage.floor(stage.matt(cells, 3))
    stage.wall(2.3, stage.matt(bricks, (6, 2)))
    for step, carpet in enumerate((checker, clouds, cells, dots, marble)):
        stage.box(
            [0, -0.5 + 0.5 * step, 0.13 * (step + 0.5)], [2.8, 0.5, 0.13 * (step + 1)], stage.matt(carpet, (2, 0.5))
        )
        x = rng.uniform(-0.9, 0.9)
        radius = rng.uniform(0.13, 0.22)
        material = stage.metal() if step == 2 else stage.glossy()
        stage.ball([x, -0.5 + 0.5 * step, 0.13 * (step + 1) + radius], radius, material)
    for x in (-1.25, 1.25):
        for step in range(5):
            stage.column([x, -0.5 + 0.5 * step, 0.13 * (step + 1)], 0.06, 0.55, stage.plain())


def fence(stage: Stage) -> None:
    """Thin slats before boxes, a chrome ball and a vase: much is hidden in every view."""
    rng = stage.rng
    stage.floor(stage.matt(clouds, 3))
    stage.wall(2.2, stage.matt(marble, (4, 1)))
    slats = stage.matt(stripes)
    for index in range(7):
        x = -1.35 + 0.45 * index
        stage.box([x, -0.75, 0.4], [0.1, 0.05, 0.8], slats, turn=rng.uniform(-10, 10))
    stage.box([0, -0.72, 0.55], [3.0, 0.04, 0.08], slats)
    for x, size in ((-1.0, 0.8), (0.15, 0.6), (1.1, 0.9)):
        stage.box([x, 0.7, size / 2], [size, 0.5, size], stage.glossy(), turn=rng.uniform(-30, 30))
    stage.ball([-0.35, 0.0, 0.35], 0.35, stage.metal(roughness=0.01))
    stage.mesh(vase(rng, 0.9, 0.28), [0.6, 0.1, 0], stage.glossy(cells))


def shelf(stage: Stage) -> None:
    """A case of books, with pottery between them."""
    rng = stage.rng
    stage.floor(stage.matt(checker, 3))
    stage.wall(1.3, stage.matt(clouds, (4, 1)))
    board = stage.matt(wood)
    for z in (0.05, 0.72, 1.39):
        stage.box([0, 0.7, z], [3.0, 0.8, 0.07], board)
    for x in (-1.5, 0.0, 1.5):
        stage.box([x, 0.7, 0.72], [0.07, 0.8, 1.4], board)
    for z in (0.085, 0.755):
        for left in (-1.45, 0.05):
            x = left
            while x < left + rng.uniform(0.7, 1.0):
                width, height = rng.uniform(0.08, 0.16), rng.uniform(0.35, 0.55)
                depth = rng.uniform(0.4, 0.65)
                stage.box([x + width / 2, 0.35 + depth / 2, z + height / 2], [width, depth, height], stage.glossy())
                x += width + 0.01
            stage.mesh(vase(rng, 0.42, 0.17), [left + 1.2, 0.6, z], stage.glossy())
    for x, material in ((-0.9, stage.metal((0.9, 0.7, 0.5))), (0.3, stage.glossy(dots)), (1.0, stage.plain())):
        stage.ball([x, 0.6, 1.65], 0.23, material)


def panels(stage: Stage) -> None:
    """Pictures that lean this way and that, one a mirror."""
    rng = stage.rng
    stage.floor(stage.matt(wood, 2))
    stage.wall(2.5, stage.matt(dots, (4, 1)))
    for index, (x, y) in enumerate(
        ((-1.2, 0.9), (-0.3, 1.2), (0.8, 1.0), (-0.8, 0.0), (0.35, 0.1), (1.2, -0.2), (-0.2, -0.8))
    ):
        height = rng.uniform(0.7, 1.2) if y > 0.5 else rng.uniform(0.5, 0.7)
        material = stage.metal((0.92, 0.95, 0.97), 0.01) if index == 4 else stage.glossy(poster if index % 2 else None)
        stage.box([x, y, height / 2], [rng.uniform(0.5, 0.9), 0.08, height], material, turn=rng.uniform(-35, 35))


def still_life(stage: Stage) -> None:
    """Pottery, blocks, a ring and a silver ball on a cloth."""
    rng = stage.rng
    stage.floor(stage.matt(stripes, 2))
    stage.wall(1.9, stage.matt(cells, (4, 1)))
    stage.box([0, 0.2, 0.15], [2.6, 1.8, 0.3], stage.matt(checker))
    stage.mesh(vase(rng, 1.1, 0.35), [-0.6, 0.6, 0.3], stage.glossy(marble))
    stage.mesh(vase(rng, 0.7, 0.28), [0.75, 0.5, 0.3], stage.glossy(dots))
    stage.box([0.15, 0.75, 0.6], [0.5, 0.5, 0.6], stage.matt(poster), turn=30)
    stage.box([-0.3, -0.2, 0.45], [0.35, 0.35, 0.3], stage.glossy(bricks), turn=-20)
    stage.ball([0.35, -0.1, 0.58], 0.28, stage.metal(roughness=0.04))
    stage.mesh(torus_knot(1, 0, 0.26, 0.08), [0.85, -0.35, 0.38], stage.glossy(clouds), tilt=12)
    stage.ball([-0.95, -0.3, 0.48], 0.18, stage.glossy(wood))


def courtyard(stage: Stage) -> None:
    """An arch between columns, steps, a basin of still water."""
    rng = stage.rng
    stage.floor(stage.matt(bricks, 4))
    stage.wall(2.5, stage.matt(clouds, (6, 2)))
    for x in (-0.9, 0.9):
        stage.column([x, 0.8, 0], 0.2, 1.1, stage.matt(marble, 2))
        stage.box([x, 0.8, 1.15], [0.55, 0.55, 0.12], stage.matt(stripes))
    stage.mesh(torus_knot(1, 0, 0.9, 0.14), [0, 0.8, 1.1], stage.matt(checker), tilt=90)
    for step in range(3):
        stage.box([0, 1.4 + 0.3 * step, 0.1 * (step + 1)], [2.2, 0.3, 0.2 * (step + 1)], stage.matt())
    stage.box([0, -0.3, 0.1], [1.2, 0.9, 0.2], stage.glossy(cells))
    stage.box([0, -0.3, 0.205], [1.0, 0.7, 0.02], stage.metal((0.6, 0.75, 0.8), 0.01))
    stage.mesh(vase(rng, 0.6, 0.22), [-1.05, -0.5, 0], stage.glossy(poster))
    stage.ball([1.0, -0.4, 0.28], 0.28, stage.glossy(dots))
    stage.mesh(torus_knot(2, 3, 0.2, 0.06), [0, -0.3, 0.5], stage.metal((1.0, 0.7, 0.5), 0.15), tilt=60)


TRAIN: tuple[Callable[[Stage], None], ...] = (
    market, colonnade, playroom, bubbles, knot, valley, stairs, fence, shelf, panels,
)  # fmt: skip
HELD_OUT: tuple[Callable[[Stage], None], ...] = (still_life, courtyard)
