"""From a batch's number to its uint8 crops: order, reading, decoding, cropping in one pure function (free of torch)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from seer.data import crops, photometric_parameters
from seer.data.crops import CropSpec, UInt8s
from seer.data.decode import BadImage, OpenedImage, open_image
from seer.data.order import Int64s, ShardOrder
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.sources import read_sample
from seer.errors import UserError
from seer.keyed_random import uniforms
from seer.shard_index import ShardIndex

# A bad image is replaced by one of so many that follow it in its shard, then by the first ones of the next shards.
_CANDIDATES = 8
_SHARDS_TRIED = 8
# Images whose files are held in memory together.
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class BadSample:
    """A sample that was replaced.

    Attributes:
        shard: path of the tar.
        sample: its place in the shard.
        reason: one word (see `seer.data.decode.BadImage`).
    """

    shard: str
    sample: int
    reason: str


class BatchAssembler:
    """Makes a rank's part of any batch: a pure function of the arguments and the batch's number.

    Args:
        shards: the shards.
        order: which sample stands where.
        seed: keys crops, flips and colours.
        slots: (N,) int64: the places of the global batch that this rank makes.
        specs: resolutions.
        flip_probability: share of mirrored crops.
        photometric: distribution of colour and blur.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        order: ShardOrder,
        *,
        seed: int,
        slots: Int64s,
        specs: Sequence[CropSpec],
        flip_probability: float,
        photometric: PhotometricSpec,
    ) -> None:
        self._shards, self._order, self._seed, self._slots = shards, order, seed, slots
        self._specs, self._flip_probability, self._photometric = list(specs), flip_probability, photometric
        self._crops = sum(spec.count for spec in specs)

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """Shape of the crops of each resolution: (count x N, S, S, 3)."""
        return [(spec.count * len(self._slots), spec.size, spec.size, 3) for spec in self._specs]

    def parameters(self, batch_index: int) -> list[NDArray[np.float32]]:
        """Photometric parameters of each resolution: (count x N, P) float32, rows as those of the crops."""
        draws = photometric_parameters.DRAWS
        numbers = uniforms(self._seed, "photometric", batch_index, self._slots, self._crops, draws).swapaxes(0, 1)
        ends = np.cumsum([spec.count for spec in self._specs])
        return [
            photometric_parameters.photometric_parameters(
                numbers[end - spec.count : end].reshape(-1, draws), self._photometric
            )
            for spec, end in zip(self._specs, ends, strict=True)
        ]

    def fill(self, batch_index: int, out: Sequence[UInt8s]) -> list[BadSample]:
        """Writes the crops of a batch.

        Args:
            out: one uint8 array a resolution, of `shapes`; rows [v*N, (v+1)*N) belong to crop v.

        Returns:
            the samples that had to be replaced.

        Raises:
            UserError: a shard cannot be read, or too many images in a row cannot be decoded.
        """
        numbers = uniforms(self._seed, "crops", batch_index, self._slots, self._crops, crops.DRAWS)
        shard, sample = self._order.positions(batch_index, self._slots)
        places = list(zip(shard.tolist(), sample.tolist(), strict=True))
        bad: list[BadSample] = []
        for start in range(0, len(places), _ROWS_AT_ONCE):
            bad += self._fill_rows(start, places[start : start + _ROWS_AT_ONCE], numbers, out)
        return bad

    def _fill_rows(
        self, start: int, places: list[tuple[int, int]], numbers: NDArray[np.float64], out: Sequence[UInt8s]
    ) -> list[BadSample]:
        bad: list[BadSample] = []
        # Headers first: the boxes of all images are then found in one go, and a JPEG is decoded no larger than needed.
        opened: list[OpenedImage | str] = []  # or why it cannot be decoded
        for shard, sample in places:
            try:
                opened.append(open_image(read_sample(self._shards[shard], sample)))
            except BadImage as error:
                bad.append(self._bad(shard, sample, error))
                opened.append(error.reason)
        sizes = np.array([(1, 1) if isinstance(image, str) else image.size for image in opened], np.int64)
        plan = crops.plan_crops(sizes, self._specs, numbers[start : start + len(places)], self._flip_probability)
        for index, (shard, sample) in enumerate(places):
            image, opened[index] = opened[index], ""  # one decoded image at a time
            if isinstance(image, str):
                reason = image
            else:
                try:
                    self._cut(image, plan, index, out, start + index)
                    continue
                except BadImage as error:
                    bad.append(self._bad(shard, sample, error))
                    reason = error.reason
            row = start + index
            bad += self._substitute(shard, sample, reason, numbers[row : row + 1], out, row)
        return bad

    def _cut(self, image: OpenedImage, plan: crops.CropPlan, index: int, out: Sequence[UInt8s], row: int) -> None:
        pixels = image.load(float(plan.scales[index]))
        crops.cut_crops(pixels, image.size, plan.boxes[index], plan.flips[index], self._specs, out, row)

    def _substitute(
        self, shard: int, sample: int, reason: str, numbers: NDArray[np.float64], out: Sequence[UInt8s], row: int
    ) -> list[BadSample]:
        bad: list[BadSample] = []
        for other_shard, other in self._candidates(shard, sample):
            try:
                image = open_image(read_sample(self._shards[other_shard], other))
                sizes = np.array([image.size], np.int64)
                plan = crops.plan_crops(sizes, self._specs, numbers, self._flip_probability)
                self._cut(image, plan, 0, out, row)
                return bad
            except BadImage as error:
                bad.append(self._bad(other_shard, other, error))
        raise UserError(
            f"shard {self._shards[shard].path}, sample {sample} cannot be decoded ({reason})",
            f"nor can {len(bad)} others in its place (the last one: {bad[-1].reason})" if bad else "there is no other",
            "pack the folder again without them",
        )

    def _candidates(self, shard: int, sample: int) -> Iterator[tuple[int, int]]:
        counts = self._order.counts
        for step in range(1, min(_CANDIDATES, int(counts[shard]) - 1) + 1):
            yield shard, (sample + step) % int(counts[shard])
        others = [(shard + step) % len(counts) for step in range(1, len(counts))]
        for other in [other for other in others if counts[other]][:_SHARDS_TRIED]:
            for first in range(min(_CANDIDATES, int(counts[other]))):
                yield other, first

    def _bad(self, shard: int, sample: int, error: BadImage) -> BadSample:
        return BadSample(str(self._shards[shard].path), sample, error.reason)
