"""Scenes written in each format, by the formats' own definitions, not by vitrify's code."""

import json
import struct

import numpy as np
import torch
from PIL import Image

HEIGHT, WIDTH, FOCAL = 12, 16, 20.0


def random_poses(count=5, seed=0, spread=0.3):
    """Camera-to-world matrices (count, 4, 4), OpenCV axes, all looking more or less along +z."""
    generator = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    for pose in poses:
        axis = generator.normal(size=3)
        angle = generator.uniform(0, spread)
        x, y, z = axis / np.linalg.norm(axis)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        pose[:3, :3] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        pose[:3, 3] = generator.uniform(-1, 1, 3)
    return poses


def picture(index, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_images(folder, count, height=HEIGHT, width=WIDTH):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(picture(index, height, width)).save(folder / f"{index:02}.png")


def write_blender(folder, poses, **extra):
    """OpenGL axes: x right, y up, z backward; file names without their ending, as NeRF's are."""
    write_images(folder / "train", len(poses))
    opengl = poses @ np.diag([1.0, -1, -1, 1])
    frames = [{"file_path": f"./train/{i:02}", "transform_matrix": pose.tolist()} for i, pose in enumerate(opengl)]
    content = {"camera_angle_x": 2 * np.arctan(WIDTH / 2 / FOCAL), "frames": frames, **extra}
    (folder / "transforms.json").write_text(json.dumps(content))


def write_llff(folder, poses, bounds=(2.0, 9.0), scale=1, images="images"):
    """Columns down, right, backward, place, (height, width, focal); `scale`: the poses are for larger images."""
    write_images(folder / images, len(poses))
    rows = []
    for pose in poses:
        right, down, forward, place = pose[:3].T
        size = np.array([HEIGHT, WIDTH, FOCAL]) * scale
        matrix = np.stack([down, right, -forward, place, size], 1)
        rows.append([*matrix.reshape(-1), *bounds])
    np.save(folder / "poses_bounds.npy", np.array(rows))


def quaternion(rotation):
    """(w, x, y, z) of a rotation that is less than a half turn."""
    w = np.sqrt(1 + np.trace(rotation)) / 2
    x, y, z = (rotation[i, j] - rotation[j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    return np.array([w, x / (4 * w), y / (4 * w), z / (4 * w)])


def colmap_contents(poses, depth=4.0, count=40, seed=0):
    """World-to-camera (quaternion, shift) of each pose, and points (count, 3) about `depth` before the first."""
    inverse = np.linalg.inv(poses)
    points = np.random.default_rng(seed).uniform([-0.5, -0.5, depth - 1], [0.5, 0.5, depth + 1], (count, 3))
    points = points @ poses[0, :3, :3].T + poses[0, :3, 3]
    return [(quaternion(pose[:3, :3]), pose[:3, 3]) for pose in inverse], points


def write_colmap_text(folder, poses, camera=("PINHOLE", FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2), model="sparse/0"):
    write_images(folder / "images", len(poses))
    (folder / model).mkdir(parents=True, exist_ok=True)
    cameras, points = colmap_contents(poses)
    name, *parameters = camera
    numbers = " ".join(str(value) for value in parameters)
    header = "# Camera list with one line of data per camera:\n"
    (folder / model / "cameras.txt").write_text(f"{header}7 {name} {WIDTH} {HEIGHT} {numbers}\n")
    lines = ["# Image list with two lines of data per image:"]
    # Images come in the order in which they were registered; the last sees nothing, and its line is empty.
    for index, (rotation, shift) in reversed(list(enumerate(cameras))):
        values = " ".join(repr(float(value)) for value in (*rotation, *shift))
        seen = " ".join(f"1.5 2.5 {number}" for number in range(10, 10 + len(points)))
        lines += [f"{index + 1} {values} 7 {index:02}.png", "" if index == len(poses) - 1 else f"3.5 4.5 -1 {seen}"]
    (folder / model / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{10 + i} {x} {y} {z} 255 0 0 0.5 1 0 2 0" for i, (x, y, z) in enumerate(points)]
    (folder / model / "points3D.txt").write_text("\n".join(["# 3D point list", *rows]) + "\n")


def write_colmap_binary(folder, poses, model="sparse/0"):
    write_images(folder / "images", len(poses))
    (folder / model).mkdir(parents=True, exist_ok=True)
    cameras, points = colmap_contents(poses)
    camera = struct.pack("<QiiQQ4d", 1, 7, 1, WIDTH, HEIGHT, FOCAL, FOCAL, WIDTH / 2, HEIGHT / 2)
    (folder / model / "cameras.bin").write_bytes(camera)
    content = struct.pack("<Q", len(poses))
    for index, (rotation, shift) in reversed(list(enumerate(cameras))):
        content += struct.pack("<i7di", index + 1, *rotation, *shift, 7) + f"{index:02}.png".encode() + b"\0"
        numbers = [] if index == len(poses) - 1 else [-1, *range(10, 10 + len(points))]
        content += struct.pack("<Q", len(numbers)) + b"".join(struct.pack("<ddq", 1.5, 2.5, n) for n in numbers)
    (folder / model / "images.bin").write_bytes(content)
    content = struct.pack("<Q", len(points))
    for index, point in enumerate(points):
        content += struct.pack("<Q3d3BdQ", 10 + index, *point, 255, 0, 0, 0.5, 2) + struct.pack("<4i", 1, 0, 2, 0)
    (folder / model / "points3D.bin").write_bytes(content)


def poses_of(scene):
    return torch.stack([view.camera_to_world for view in scene.views])
