"""Features of labelled shards: decode, evaluation crop, forward in evaluation mode.

A crop is ``data.crops.evaluation_crop``: shorter side to round(size / 0.875), bilinear, central square; then ImageNet's
mean and standard deviation, as the exported weights' metadata say.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from seer.data.crops import MEAN, STD, evaluation_crop
from seer.data.decode import DEFAULT_LIMITS, BadImage, ImageLimits, decode
from seer.data.shard_cache import say
from seer.data.sources import ShardReader
from seer.errors import UserError
from seer.shard_index import ShardIndex
from seer.shard_list import ShardList

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LabelledCrops:
    """Evaluation crops in memory.

    Attributes:
        crops: (n, size, size, 3) uint8.
        labels: (n,) int64.
        bad: reason -> number of images that could not be decoded and are left out.
    """

    crops: Tensor
    labels: Tensor
    bad: Counter[str]


@dataclass(frozen=True)
class LabelledFeatures:
    """Features with their labels, on the CPU.

    Attributes:
        features: (N, F) float32, or float64 where the network computes in it, or float16 pixels.
        labels: (N,) int64.
        bad: reason -> number of images that could not be decoded and are left out.
    """

    features: Tensor
    labels: Tensor
    bad: Counter[str]


def chosen_samples(counts: NDArray[np.int64], max_images: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which images an evaluation takes: all, or `max_images` spread evenly.

    Every shard gives the same number as far as it has them, and within a shard they lie at equal distances: shards
    packed folder by folder hold one class after another, and the first images would be of few classes.

    Returns:
        shard and sample numbers, int64, in reading order.
    """
    quotas = counts if max_images is None else _quotas(counts, max_images)
    shards = np.repeat(np.arange(len(counts)), quotas)
    samples = [((2 * np.arange(quota) + 1) * count) // (2 * quota) for quota, count in zip(quotas, counts, strict=True)]
    return shards, np.concatenate([*samples, np.empty(0, np.int64)]).astype(np.int64)


def require_labels(shards: ShardList, max_images: int | None = None) -> None:
    """Refuses shards in which an image that ``chosen_samples`` takes has no label; reads no tar.

    Raises:
        UserError: names the first such shard.
    """
    _labels(shards, *chosen_samples(shards.counts, max_images))


def labelled_crops(
    shards: ShardList,
    *,
    image_size: int,
    limits: ImageLimits = DEFAULT_LIMITS,
    batch_size: int = 256,
    max_images: int | None = None,
    threads: int | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[LabelledCrops]:
    """Evaluation crops of labelled shards in batches; the next batch is decoded while the caller works on one.

    Several ranks take shares that follow each other in reading order and differ by one image at most. All give the same
    number of batches: the last ones may be empty.

    Args:
        shards: with a label for every image that is taken.
        image_size: side of the crops, pixels.
        limits: which images are refused.
        batch_size: images a batch, those that cannot be decoded included.
        max_images: as ``chosen_samples``, of all ranks together.
        threads: that decode; default: the cores of this process, at most 8.
        rank, ranks: which share.

    Raises:
        UserError: images without labels, or a shard that was changed; in one process also no image that can be decoded
            (a rank cannot know that of the others: ``require_images``).
    """
    shard_numbers, samples = chosen_samples(shards.counts, max_images)
    images = len(samples)
    labels = _labels(shards, shard_numbers, samples)
    share = slice(rank * images // ranks, (rank + 1) * images // ranks)
    shard_numbers, samples, labels = shard_numbers[share], samples[share], labels[share]
    found, bad = 0, Counter[str]()
    reader = ShardReader(shards.reading, say if rank == 0 else None)
    with contextlib.closing(reader), ThreadPoolExecutor(threads or _cores(), "seer-decode") as pool:

        def ask(start: int) -> list[Future[NDArray[np.uint8] | str]]:
            part = slice(start, start + batch_size)
            # Bytes are read here, in order; only decoding is shared out.
            places = zip(shard_numbers[part], samples[part], strict=True)
            data = (_read(reader, shards[int(shard)], sample, limits) for shard, sample in places)
            return [pool.submit(_crop, image, image_size, limits) for image in data]

        asked = ask(0)
        for start in range(0, -(-images // ranks), batch_size):
            following = ask(start + batch_size)
            crops = [future.result() for future in asked]
            good = [crop for crop in crops if not isinstance(crop, str)]
            kept = torch.tensor([not isinstance(crop, str) for crop in crops], dtype=torch.bool)
            asked = following
            found += len(good)
            reasons = Counter(crop for crop in crops if isinstance(crop, str))
            bad.update(reasons)
            yield LabelledCrops(
                torch.from_numpy(np.stack(good))
                if good
                else torch.empty(0, image_size, image_size, 3, dtype=torch.uint8),
                labels[start : start + batch_size][kept],
                reasons,
            )
    if ranks == 1:
        require_images(shards, found, bad)


def require_images(shards: ShardList, found: int, bad: Counter[str]) -> None:
    """Refuses shards of which no image could be decoded.

    Raises:
        UserError: names the first shard and the reasons.
    """
    if not found:
        what = f"no image of {shards.listed[0].location} and what else was named can be decoded: {described(bad)}"
        raise UserError(what, "an evaluation needs images", "pack the folder again without them")


def features_of(
    forward: Forward,
    batches: Iterable[LabelledCrops],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LabelledFeatures:
    """Features of crops, computed in evaluation mode and without gradients.

    Each batch is one call of `forward`, an empty one too (with a zero image): where weights are sharded, the forward is
    a collective, and ranks must call it equally often.

    Args:
        forward: normalised images (n, 3, size, size) to features (n, F). A module, or a method of one, is put into
            evaluation mode for the time and put back, part by part.
        batches: from ``labelled_crops``.
        device: where `forward` computes.
        dtype: float32, float64 (images are then float64), or bfloat16 / float16 (autocast).
    """
    device = torch.device(device)
    features, labels, bad = [], [], Counter[str]()
    with _evaluation_mode(forward), torch.no_grad():
        for batch in batches:
            labels.append(batch.labels)
            bad.update(batch.bad)
            crops = batch.crops if len(batch.crops) else batch.crops.new_zeros(1, *batch.crops.shape[1:])
            images = _normalised(crops.to(device), torch.float64 if dtype == torch.float64 else torch.float32)
            with torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
                rows = forward(images)[: len(batch.crops)]
            features.append((rows if rows.dtype == torch.float64 else rows.float()).cpu())
    return LabelledFeatures(torch.cat(features), torch.cat(labels), bad)


def image_features(
    forward: Forward,
    shards: ShardList,
    *,
    image_size: int,
    limits: ImageLimits = DEFAULT_LIMITS,
    batch_size: int = 256,
    max_images: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
) -> LabelledFeatures:
    """Features of labelled shards: ``labelled_crops``, then ``features_of``."""
    batches = labelled_crops(
        shards, image_size=image_size, limits=limits, batch_size=batch_size, max_images=max_images, threads=threads
    )
    return features_of(forward, batches, device=device, dtype=dtype)


def pixel_features(batches: Iterable[LabelledCrops]) -> LabelledFeatures:
    """The baseline that knows nothing: the evaluation crop as networks get it, in one row of size x size x 3 numbers.

    kNN brings rows to unit norm, so that this compares images by the cosine of their pixels after ImageNet's mean and
    deviation (bytes, which are all positive, would score lower: an easier baseline to beat). float16, to save memory.
    """
    mean, deviation = (255 * torch.tensor(numbers) for numbers in (MEAN, STD))
    rows, labels, bad = [], [], Counter[str]()
    for batch in batches:
        rows.append(((batch.crops - mean) / deviation).half().flatten(1))
        labels.append(batch.labels)
        bad.update(batch.bad)
    return LabelledFeatures(torch.cat(rows), torch.cat(labels), bad)


def described(bad: Counter[str]) -> str:
    """Reasons in words: ``3 images (truncated 2, not_an_image 1)``."""
    total = bad.total()
    reasons = ", ".join(f"{reason} {count}" for reason, count in bad.most_common())
    return f"{total} image{'' if total == 1 else 's'} ({reasons})"


def _quotas(counts: NDArray[np.int64], max_images: int) -> NDArray[np.int64]:
    """As many images of each shard as one by one in turn would take."""
    if max_images < 1:
        raise UserError(f"max_images={max_images}", "an evaluation needs images", "use 1 or more, or null for all")
    quotas, left = np.zeros_like(counts), min(max_images, int(counts.sum()))
    while left:
        having = np.flatnonzero(quotas < counts)
        share, rest = divmod(left, len(having))
        if not share:
            quotas[having[:rest]] += 1
            break
        given = np.minimum(share, (counts - quotas)[having])
        quotas[having] += given
        left -= int(given.sum())
    return quotas


def _labels(shards: ShardList, shard_numbers: NDArray[np.int64], samples: NDArray[np.int64]) -> Tensor:
    labels = np.empty(len(samples), np.int64)
    for number in np.unique(shard_numbers):
        rows = shard_numbers == number
        labels[rows] = shards[int(number)].labels[samples[rows]]
        if (labels[rows] < 0).any():
            raise UserError(
                f"{shards.listed[int(number)].location} holds images without labels",
                "kNN compares labels",
                "pack a folder a class with: seer shards pack PHOTOS_DIR --out SHARDS_DIR --labels folders",
            )
    return torch.from_numpy(labels)


def _cores() -> int:
    """The cores that this process may use, at most 8: beyond that, reading is the limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _read(reader: ShardReader, shard: ShardIndex, sample: int, limits: ImageLimits) -> bytes | str:
    """The file, or why it is not read."""
    try:
        limits.refuse_bytes(int(shard.sizes[sample]))
    except BadImage as error:
        return error.reason
    return reader.read(shard, sample)


def _crop(data: bytes | str, size: int, limits: ImageLimits) -> NDArray[np.uint8] | str:
    """The crop, or why there is none."""
    if isinstance(data, str):
        return data
    try:
        return evaluation_crop(decode(data, limits), size)
    except BadImage as error:
        return error.reason


def _normalised(crops_NHWC: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 3, H, W) with channels innermost in memory, as the bytes lie."""
    mean = torch.tensor(MEAN, dtype=dtype, device=crops_NHWC.device)
    std = torch.tensor(STD, dtype=dtype, device=crops_NHWC.device)
    return ((crops_NHWC.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)


@contextlib.contextmanager
def _evaluation_mode(forward: Forward) -> Iterator[None]:
    owner = forward if isinstance(forward, nn.Module) else getattr(forward, "__self__", None)
    training = [part for part in owner.modules() if part.training] if isinstance(owner, nn.Module) else []
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
