"""Labelled shards for the tests of evaluation, without the product's packing: plain tars, their index in memory."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from plain_tars import write_tar

from seer.shard_index import ShardIndex
from seer.shard_list import ShardList


def png(pixels: np.ndarray) -> bytes:
    """The bytes of an image (H, W, 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def coloured(label: int, number: int, size: int = 20) -> bytes:
    """An image whose colour says its class, with some noise."""
    colour = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 40]])[label]
    noise = np.random.default_rng(number).normal(0, 20, (size, size, 3))
    return png(np.clip(colour + noise, 0, 255).astype(np.uint8))


def shard(file: Path, samples: Sequence[tuple[bytes, int]]) -> ShardIndex:
    """A tar of images with their labels."""
    write_tar(file, *((f"{number:06d}.png", data) for number, (data, _) in enumerate(samples)))
    with tarfile.open(file) as tar:
        members = tar.getmembers()
    return ShardIndex(
        location=str(file),
        offsets=np.array([member.offset_data for member in members], np.uint64),
        sizes=np.array([member.size for member in members], np.uint32),
        labels=np.array([label for _, label in samples], np.int32),
        tar_size=file.stat().st_size,
        digest="0" * 32,
    )


def labelled(folder: Path, counts: Sequence[int] = (7, 5), classes: int = 4) -> ShardList:
    """Shards of coloured images; labels go round."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for place, count in enumerate(counts):
        samples = [(coloured((number + i) % classes, number + i), (number + i) % classes) for i in range(count)]
        shards.append(shard(folder / f"{place}.tar", samples))
        number += count
    return ShardList(shards)
