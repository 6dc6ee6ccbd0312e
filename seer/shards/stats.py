"""What is in some shards: counts and labels of all images by their indexes, sizes and faults of a sample of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seer import remote, shard_manifest
from seer.errors import UserError
from seer.keyed_random import uniforms
from seer.shard_index import ShardIndex, load_index
from seer.shard_manifest import class_name
from seer.shard_patterns import expand_shards
from seer.shards.bad_images import BadImage
from seer.shards.formats import LONGEST_START, OpenImage, extension_of
from seer.shards.processes import Progress, each, silent

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_CHUNK = 64  # images of one job: enough to outweigh its way to another process
_SCALE = 1 / 8  # a JPEG decoded at an eighth of its size is read to its last byte all the same


@dataclass(frozen=True)
class Stats:
    """What was found.

    Attributes:
        shards, images: how many there are.
        tar_bytes, image_bytes: bytes of the tars, and of the images in them.
        labels: class -> images, ascending; of named classes also those without images; empty without labels.
        unlabelled: images without label.
        classes: names of the classes where the shards' manifest has them, else empty.
        sampled: images that were read, evenly spread over all.
        formats: extension -> images of the sample ("other": no known format).
        bad: reason -> images of the sample that cannot be used.
        bad_images: each of them, in the order of the shards.
        widths, heights, bytes: (n,) int64, of the images of the sample that are not bad; pixels as they stand upright.
    """

    shards: int
    images: int
    tar_bytes: int
    image_bytes: int
    labels: dict[int, int]
    unlabelled: int
    classes: list[str]
    sampled: int
    formats: dict[str, int]
    bad: dict[str, int]
    bad_images: list[BadImage]
    widths: NDArray[np.int64]
    heights: NDArray[np.int64]
    bytes: NDArray[np.int64]

    def quantiles(self) -> dict[str, list[int]]:
        """width, height, shorter_side, longer_side, bytes -> their `QUANTILES`, each a value that occurs."""
        columns = {
            "width": self.widths,
            "height": self.heights,
            "shorter_side": np.minimum(self.widths, self.heights),
            "longer_side": np.maximum(self.widths, self.heights),
            "bytes": self.bytes,
        }
        return {
            word: np.quantile(values, QUANTILES, method="inverted_cdf").tolist()
            for word, values in columns.items()
            if len(values)
        }

    def common_sizes(self, count: int) -> list[tuple[int, int, int]]:
        """The most frequent (width, height, images) of the sample."""
        sizes = Counter(zip(self.widths.tolist(), self.heights.tolist(), strict=True))
        return [(*size, images) for size, images in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:count]]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values, for scripts."""
        return {
            "shards": self.shards,
            "images": self.images,
            "tar_bytes": self.tar_bytes,
            "image_bytes": self.image_bytes,
            "labelled": self.images - self.unlabelled,
            "labels": {class_name(self.classes, label): count for label, count in self.labels.items()},
            "sampled": self.sampled,
            "formats": self.formats,
            "bad": self.bad,
            "quantiles": {"at": list(QUANTILES), **self.quantiles()},
            "common_sizes": [
                {"width": width, "height": height, "images": images} for width, height, images in self.common_sizes(10)
            ],
        }


@dataclass(frozen=True)
class Picked:
    """One image of the shards: its bytes and the name of its class ("" for none)."""

    data: bytes
    name: str


class Shards:
    """The tars that some patterns mean; one index is held at a time, however many there are.

    Args:
        patterns: see `seer.shard_patterns.expand_shards`.
        index_dir: where the indexes are; None: beside the tars.

    Raises:
        UserError: nothing matches, an index is missing, there is no image.
    """

    def __init__(self, patterns: Sequence[str], index_dir: Path | None = None) -> None:
        self.tars = expand_shards(patterns)
        self._index_dir = index_dir
        self.tar_bytes, self.image_bytes = 0, 0
        counts, labels = [], Counter[int]()
        for tar in self.tars:
            index = load_index(tar, index_dir)
            counts.append(len(index))
            self.tar_bytes += index.tar_size
            self.image_bytes += int(index.sizes.sum(dtype=np.int64))
            # Not by np.bincount: a label may be as large as two milliards.
            here, images = np.unique(index.labels[index.labels >= 0], return_counts=True)
            labels.update(dict(zip(here.tolist(), images.tolist(), strict=True)))
        self.counts: NDArray[np.int64] = np.array(counts, np.int64)
        self.images = int(self.counts.sum())
        self.classes = _classes(self.tars)
        named = range(len(self.classes)) if labels else ()
        self.labels: dict[int, int] = {label: labels[label] for label in sorted({*named, *labels})}
        if not self.images:
            what = f"{self.tars[0]} and what else was named hold no image"
            raise UserError(what, "there is nothing to look at", "check the shards")

    def at(self, places: NDArray[np.int64]) -> Iterator[tuple[ShardIndex, NDArray[np.int64], NDArray[np.int64]]]:
        """(index of a shard, those of the ascending places that lie in it, samples in it), shard by shard."""
        ends = np.cumsum(self.counts)
        shard_of = np.searchsorted(ends, places, side="right")
        for shard in np.unique(shard_of):
            index = load_index(self.tars[shard], self._index_dir)
            here = places[shard_of == shard]
            yield index, here, here - (ends[shard] - self.counts[shard])

    def pick(self, count: int, seed: int = 0) -> list[Picked]:
        """Up to `count` different random images, the same ones for the same seed, in a random order."""
        draws = uniforms(seed, "sheet", 0, np.arange(4 * count, dtype=np.int64), 1, 1).ravel()
        if self.images <= count:
            drawn = np.argsort(draws[: self.images], kind="stable").tolist()
        else:
            drawn = list(dict.fromkeys((draws * self.images).astype(np.int64).tolist()))[:count]
        found: dict[int, Picked] = {}
        for index, places, samples in self.at(np.sort(np.array(drawn, np.int64))):
            datas = _read(
                index.location, index.tar_size, index.offsets[samples].tolist(), index.sizes[samples].tolist()
            )
            for place, label, data in zip(places.tolist(), index.labels[samples].tolist(), datas, strict=True):
                found[place] = Picked(data, class_name(self.classes, label))
        return [found[place] for place in drawn]


def _classes(tars: Sequence[str]) -> list[str]:
    """The names on which the manifests of all folders agree, else none."""
    lists = [
        (shard_manifest.read(folder) or {}).get("classes") or []
        for folder in sorted({shard_manifest.folder_of(tar) for tar in tars})
    ]
    return lists[0] if all(names == lists[0] for names in lists) else []


def _read(tar: str, tar_size: int, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[bytes]:
    if remote.is_remote(tar):
        for offset, size in zip(offsets, sizes, strict=True):
            yield remote.read_range(tar, offset, size, size=tar_size, patience=remote.PATIENCE)
        return
    try:
        with open(tar, "rb", buffering=0) as file:
            for offset, size in zip(offsets, sizes, strict=True):
                data = os.pread(file.fileno(), size, offset)
                if len(data) != size:
                    raise UserError(f"{tar} ends inside an image", "it was cut", "run: seer shards verify")
                yield data
    except OSError as error:
        raise UserError(f"{tar} cannot be read ({error.strerror})", "a shard is a tar file", "check the path") from None


@dataclass(frozen=True)
class _Chunk:
    """The job of one process: some images of one tar."""

    tar: str
    tar_size: int
    offsets: list[int]
    sizes: list[int]
    open_image: OpenImage


_Row = tuple[str, str, int, int, int]  # format, reason or "", width, height, bytes


def _examine(chunk: _Chunk) -> list[_Row]:
    return [_row(data, chunk.open_image) for data in _read(chunk.tar, chunk.tar_size, chunk.offsets, chunk.sizes)]


def _row(data: bytes, open_image: OpenImage) -> _Row:
    extension = extension_of(data[:LONGEST_START]) or "other"
    try:
        opened = open_image(data)
        width, height = opened.size
        opened.load(_SCALE)
    except Exception as error:
        reason = getattr(error, "reason", None)
        if reason is None:
            raise
        return extension, str(reason), 0, 0, len(data)
    return extension, "", width, height, len(data)


def stats(
    shards: Shards,
    open_image: OpenImage,
    *,
    max_images: int | None = 2000,
    workers: int = 1,
    progress: Progress = silent,
) -> Stats:
    """Counts everything by the indexes, then decodes a sample of the images, evenly spread over all.

    Args:
        shards: what to look at.
        open_image: bytes to an image.
        max_images: size of the sample; None: every image.
        workers: processes.
        progress: called with bytes done and bytes in all.

    Raises:
        UserError: a tar cannot be read.
    """
    count = shards.images if max_images is None else min(max_images, shards.images)
    places = (np.arange(count, dtype=np.int64) * 2 + 1) * shards.images // (2 * count)
    jobs = [
        _Chunk(
            index.location,
            index.tar_size,
            index.offsets[samples[start : start + _CHUNK]].tolist(),
            index.sizes[samples[start : start + _CHUNK]].tolist(),
            open_image,
        )
        for index, _, samples in shards.at(places)
        for start in range(0, len(samples), _CHUNK)
    ]
    done, total = 0, sum(sum(job.sizes) for job in jobs)
    rows: list[_Row] = []
    bad: list[BadImage] = []
    for job, found in each(_examine, jobs, workers):
        rows += found
        bad += [BadImage(job.tar, at, row[1]) for at, row in zip(job.offsets, found, strict=True) if row[1]]
        done += sum(job.sizes)
        progress(done, total)
    order = {tar: number for number, tar in enumerate(shards.tars)}
    good = np.array(sorted(row[2:] for row in rows if not row[1]), np.int64).reshape(-1, 3)
    return Stats(
        len(shards.tars),
        shards.images,
        shards.tar_bytes,
        shards.image_bytes,
        shards.labels,
        shards.images - sum(shards.labels.values()),
        shards.classes,
        count,
        _counted(row[0] for row in rows),
        _counted(row[1] for row in rows if row[1]),
        sorted(bad, key=lambda image: (order[image.tar], image.offset)),
        good[:, 0],
        good[:, 1],
        good[:, 2],
    )


def _counted(words: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])))
