"""Makes the demo's images: ten classes of textures, drawn by arithmetic (numpy and Pillow only), nothing is downloaded.

    python data_shards/make_demo.py data_shards/demo/images
    python data_shards/make_demo.py OUT --train 400 --val 100 --seed 1 --workers 2

writes OUT/train/<class>/00042.jpg and OUT/val/<class>/..., 96x96 pixels. The class is the rule of the texture; period,
angle, phase, colours, light, warp, outline and background are drawn independently of it, so that raw pixels say little
(nearest neighbours find the class of 11 to 14 %) and a network has to find the rule. Each image is a pure function of
(seed, split, index); the classes take turns.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 96
VERSION = 1  # goes up when the same options give other images
STAMP = "demo.json"
SPLITS = ("train", "val")
EDGE = 1.25  # pixels over which a texture's edge goes from 0 to 1
CHUNK = 50

# JPEG decodes in 0.17 ms where PNG needs 0.30 ms, and takes 10 kB where PNG takes 21 kB (Pillow, x86). At quality 92
# without colour subsampling a pixel is off by 4 grey levels in the mean: less than the noise that is drawn, up to 13.
JPEG: dict[str, Any] = {"format": "JPEG", "quality": 92, "subsampling": 0}

Plane = NDArray[Any]  # (SIDE, SIDE) float32, one number a pixel
Random = np.random.Generator


def _between(random: Random, low: float, high: float) -> Any:
    return np.float32(low + (high - low) * random.random())


def _frac(values: Plane) -> Plane:
    return values - np.floor(values)


def _smooth_noise(random: Random, cell: float) -> Plane:
    """(SIDE, SIDE) numbers in [-1, 1]: uniform at the nodes of a grid of `cell` pixels, smooth in between."""
    at = (np.arange(SIDE, dtype=np.float32) + np.float32(random.random() * cell)) / np.float32(cell)
    node = at.astype(np.int64)
    weight = _frac(at)
    weight = weight * weight * (3 - 2 * weight)
    between = np.zeros((SIDE, node[-1] + 2), np.float32)
    rows = np.arange(SIDE)
    between[rows, node] = 1 - weight
    between[rows, node + 1] = weight
    nodes = random.random((between.shape[1], between.shape[1]), np.float32) * 2 - 1
    smooth: Plane = between @ nodes @ between.T
    return smooth


def _cells(u: Plane, v: Plane) -> tuple[NDArray[np.int64], NDArray[np.int64], Plane, Plane]:
    """Unit cells, every second row shifted by half: column, row, and place in the cell from -1/2 to 1/2."""
    row = np.floor(v)
    shifted = u + np.float32(0.5) * (row % 2)
    column = np.floor(shifted)
    return column.astype(np.int64), row.astype(np.int64), shifted - column - np.float32(0.5), v - row - np.float32(0.5)


def _drawn_for_cell(random: Random, column: NDArray[np.int64], row: NDArray[np.int64]) -> Plane:
    """One number in [0, 1) a cell."""
    table = random.random((32, 32), np.float32)
    drawn: Plane = table[row % 32, column % 32]
    return drawn


# Each texture takes (random, u, v), coordinates in periods, and gives the signed distance to its edge in periods,
# positive inside. Widths and radii are fractions of a period.


def _stripes(random: Random, u: Plane, v: Plane) -> Plane:
    distance: Plane = _between(random, 0.38, 0.62) / 2 - np.abs(_frac(u) - np.float32(0.5))
    return distance


def _checker(random: Random, u: Plane, v: Plane) -> Plane:
    distance: Plane = np.sin(np.float32(np.pi) * u) * np.sin(np.float32(np.pi) * v) / np.float32(np.pi)
    return distance


def _dots(random: Random, u: Plane, v: Plane) -> Plane:
    _, _, across, along = _cells(u, v)
    distance: Plane = _between(random, 0.26, 0.36) - np.sqrt(across * across + along * along)
    return distance


def _rings(random: Random, u: Plane, v: Plane) -> Plane:
    reach = 0.33 * float(u.max() - u.min()) / 1.2  # the rotated square is up to 1.4 sides wide
    middle_u, middle_v = u[SIDE // 2, SIDE // 2], v[SIDE // 2, SIDE // 2]
    across, along = u - middle_u - _between(random, -reach, reach), v - middle_v - _between(random, -reach, reach)
    return _stripes(random, np.sqrt(across * across + along * along), v)


def _zigzag(random: Random, u: Plane, v: Plane) -> Plane:
    height = 2 * _between(random, 0.5, 0.8)
    return _stripes(random, u + height * np.abs(_frac(v / 2) - np.float32(0.5)), v)


def _bricks(random: Random, u: Plane, v: Plane) -> Plane:
    course, brick = np.float32(0.8), np.float32(1.7)
    _, _, across, along = _cells(u / brick, v / course)
    to_joint = np.minimum((np.float32(0.5) - np.abs(across)) * brick, (np.float32(0.5) - np.abs(along)) * course)
    distance: Plane = _between(random, 0.09, 0.14) - to_joint
    return distance


def _voronoi(random: Random, u: Plane, v: Plane) -> Plane:
    cell = np.float32(0.7**-0.5)  # 0.7 points a square period, one in each square of a grid
    u, v = u / cell, v / cell
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    across, along = u - column, v - row
    points = random.random((2, 64, 64), np.float32)
    nearest = np.full_like(u, 9)
    second = nearest.copy()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            place = ((row + down) % 64) * 64 + (column + right) % 64
            d_u = points[0].ravel()[place] + np.float32(right) - across
            d_v = points[1].ravel()[place] + np.float32(down) - along
            distance = d_u * d_u + d_v * d_v
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
    gap = (np.sqrt(second) - np.sqrt(nearest)) * cell
    signed: Plane = (_between(random, 0.14, 0.22) - gap) / 2
    return signed


def _truchet(random: Random, u: Plane, v: Plane) -> Plane:
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    across, along = u - column, v - row
    across = np.where(_drawn_for_cell(random, column, row) < 0.5, across, 1 - across)
    to_arc = np.minimum(
        np.abs(np.sqrt(across**2 + along**2) - np.float32(0.5)),
        np.abs(np.sqrt((1 - across) ** 2 + (1 - along) ** 2) - np.float32(0.5)),
    )
    distance: Plane = _between(random, 0.13, 0.19) - to_arc
    return distance


def _crosses(random: Random, u: Plane, v: Plane) -> Plane:
    column, row, across, along = _cells(u, v)
    turn = _drawn_for_cell(random, column, row) * np.float32(np.pi / 2)
    cosine, sine = np.cos(turn), np.sin(turn)
    a, b = np.abs(cosine * across + sine * along), np.abs(cosine * along - sine * across)
    arm, half_width = np.float32(0.42), _between(random, 0.09, 0.13)
    distance: Plane = np.maximum(np.minimum(arm - a, half_width - b), np.minimum(arm - b, half_width - a))
    return distance


def _clouds(random: Random, period: float) -> Plane:
    """The one texture without edges: three octaves of smooth noise, as the share of the first colour."""
    octaves = ((1, 1.3), (0.55, 0.65), (0.3, 0.33))
    noise: Plane = np.sum([weight * _smooth_noise(random, cell * period) for weight, cell in octaves], axis=0)
    noise = (noise - np.mean(noise)) / np.std(noise)
    clouds: Plane = np.clip(np.float32(0.5) + noise / 3, 0, 1).astype(np.float32)
    return clouds


TEXTURES: dict[str, Callable[[Random, Plane, Plane], Plane] | None] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "rings": _rings,
    "zigzag": _zigzag,
    "bricks": _bricks,
    "cells": _voronoi,
    "clouds": None,
    "truchet": _truchet,
    "crosses": _crosses,
}
CLASSES = tuple(TEXTURES)

_Y, _X = np.meshgrid(*[np.arange(SIDE, dtype=np.float32) + np.float32(0.5 - SIDE / 2)] * 2, indexing="ij")


def _turned(random: Random) -> tuple[Plane, Plane]:
    angle = random.random() * 2 * np.pi
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * _X + sine * _Y, cosine * _Y - sine * _X


def _colours(random: Random, pairs: int) -> NDArray[np.float32]:
    """(pairs, 2, 3) RGB in [0, 1]: hue anywhere, saturation 0.1 to 0.9, value 0.1 to 1."""
    hue, saturation, value = np.moveaxis(random.random((pairs, 2, 3), np.float32), -1, 0)
    saturation, value = np.float32(0.1) + np.float32(0.8) * saturation, np.float32(0.1) + np.float32(0.9) * value
    sixths = (np.array([5, 3, 1], np.float32) + hue[..., None] * 6) % 6
    falls = np.clip(np.minimum(sixths, 4 - sixths), 0, 1)
    colours: NDArray[np.float32] = value[..., None] * (1 - saturation[..., None] * falls)
    return colours


def _contrasting(random: Random) -> NDArray[np.float32]:
    """(2, 3): two colours whose lumas differ by more than 0.28, so that grey images keep the texture."""
    while True:
        pairs = _colours(random, 16)
        luma = pairs @ np.array([0.299, 0.587, 0.114], np.float32)
        good = np.flatnonzero(np.abs(luma[:, 0] - luma[:, 1]) > 0.28)
        if len(good):
            pair: NDArray[np.float32] = pairs[good[0]]
            return pair


def _outline(random: Random) -> Plane:
    """1 inside a turned superellipse, 0 outside: half axes 0.38 to 0.62 of the side, exponent 2 to 5."""
    a, b = _turned(random)
    a, b = a + _between(random, -0.14, 0.14) * SIDE, b + _between(random, -0.14, 0.14) * SIDE
    half_a, half_b = _between(random, 0.38, 0.62) * SIDE, _between(random, 0.38, 0.62) * SIDE
    power = _between(random, 2, 5)
    radius = ((np.abs(a) / half_a) ** power + (np.abs(b) / half_b) ** power) ** (1 / power)
    inside: Plane = np.clip(np.float32(0.5) + (1 - radius) * min(half_a, half_b) / np.float32(EDGE), 0, 1)
    return inside


def draw(seed: int, split: str, index: int) -> NDArray[np.uint8]:
    """One image, a pure function of its arguments; its class is CLASSES[index % 10].

    Returns:
        (96, 96, 3) uint8, RGB.
    """
    random = np.random.Generator(np.random.PCG64([VERSION, seed, SPLITS.index(split), index]))
    texture = TEXTURES[CLASSES[index % len(CLASSES)]]
    period = float(6 * 2 ** random.random())  # log-uniform, 6 to 12 pixels
    if texture is None:
        share = _clouds(random, period)
    else:
        warp = 0.24 * period
        u, v = (
            (plane + np.float32(warp) * _smooth_noise(random, 2 * period)) / np.float32(period)
            + np.float32(random.random() * 32)
            for plane in _turned(random)
        )
        share = np.clip(np.float32(0.5) + texture(random, u, v) * np.float32(period / EDGE), 0, 1)
    front, back = _contrasting(random), _colours(random, 1)[0]
    inside = _outline(random)
    mix = np.float32(0.5) + np.float32(0.5) * _smooth_noise(random, 0.35 * SIDE)
    light = 1 + np.float32(0.25) * _smooth_noise(random, 0.7 * SIDE)
    # Four colours with four weights that sum to 1, times the light: one matrix product makes the image.
    weights = np.stack([inside * share, inside * (1 - share), (1 - inside) * mix, (1 - inside) * (1 - mix)], axis=-1)
    image = (weights * light[..., None]) @ np.concatenate([front, back])
    image += _between(random, 0, 0.05) * random.standard_normal(image.shape, np.float32)
    pixels: NDArray[np.uint8] = (np.clip(image, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    return pixels


def _write(job: tuple[str, int, str, int, int]) -> int:
    """Draws and writes the images first..last-1 of a split; returns how many."""
    folder, seed, split, first, last = job
    for index in range(first, last):
        stream = io.BytesIO()
        Image.fromarray(draw(seed, split, index)).save(stream, **JPEG)
        name = f"{folder}/{split}/{CLASSES[index % len(CLASSES)]}/{index:05d}.jpg"
        with open(name, "wb") as file:
            file.write(stream.getvalue())
    return last - first


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_there(out: Path, options: dict[str, int]) -> bool:
    try:
        if json.loads((out / STAMP).read_text()) != options:
            return False
        return all(sum(len(os.listdir(out / split / name)) for name in CLASSES) == options[split] for split in SPLITS)
    except (OSError, ValueError):
        return False


def _make(out: Path, options: dict[str, int], workers: int) -> None:
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    jobs = [
        (str(part), options["seed"], split, first, min(first + CHUNK, options[split]))
        for split in SPLITS
        for first in range(0, options[split], CHUNK)
    ]
    total, done = options["train"] + options["val"], 0
    try:
        for split in SPLITS:
            for name in CLASSES:
                (part / split / name).mkdir(parents=True)
        with ProcessPoolExecutor(workers) as pool:
            for count in pool.map(_write, jobs):
                done += count
                if sys.stderr.isatty():
                    print(f"\rdrawing {done}/{total} images", end="" if done < total else "\n", file=sys.stderr)
        (part / STAMP).write_text(json.dumps(options) + "\n")
        if out.exists():
            shutil.rmtree(out)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--train", type=int, default=4000, help="images in OUT/train (4000)")
    parser.add_argument("--val", type=int, default=1000, help="images in OUT/val (1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (0)")
    parser.add_argument("--workers", type=int, default=_cores(), help="processes (one a core)")
    chosen = parser.parse_args(argv)
    if min(chosen.train, chosen.val, chosen.seed) < 0 or chosen.workers < 1:
        parser.error("--train, --val and --seed cannot be negative, --workers is at least 1")
    options = {"version": VERSION, "seed": chosen.seed, "train": chosen.train, "val": chosen.val}
    out = Path(os.path.abspath(chosen.out))
    if _is_there(out, options):
        print(f"{out} already holds these {chosen.train} + {chosen.val} images")
        return 0
    if out.exists() and not (out / STAMP).exists() and (not out.is_dir() or any(out.iterdir())):
        print(f"{out} is not empty and was not made by this script; name another folder", file=sys.stderr)
        return 2
    start = time.monotonic()
    try:
        _make(out, options, chosen.workers)
    except OSError as error:
        print(f"{out} cannot be written ({error.strerror}); name another folder", file=sys.stderr)
        return 2
    print(f"{out}: {chosen.train} + {chosen.val} images in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
