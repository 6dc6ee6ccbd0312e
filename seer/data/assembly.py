"""From a batch's number to its uint8 crops: order, reading, decoding, cropping in one pure function (free of torch)."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seer import shard_manifest
from seer.data import crops, photometric_parameters
from seer.data.ahead import INDEX_ALONE, ReadAhead
from seer.data.crops import CropSpec, UInt8s
from seer.data.cutters import cutter_of
from seer.data.decode import DEFAULT_LIMITS, BadImage, ImageLimits, OpenedImage, open_image
from seer.data.growth import GrowingOrder
from seer.data.mixture import MixedOrder
from seer.data.order import Int64s
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.sources import ShardReader
from seer.errors import UserError, shown
from seer.keyed_random import uniforms
from seer.remote import is_remote
from seer.shard_list import ShardList

# A bad image is replaced by one of so many that follow it in its shard, then by the first ones of the next shards.
_CANDIDATES = 8
_SHARDS_TRIED = 8
# Images whose files are held in memory together.
_ROWS_AT_ONCE = 32

KILLED_WORKER = "killed_worker"  # reason of a sample in quarantine

Float32s = NDArray[np.float32]


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used.

    Attributes:
        shard: path of the tar.
        sample: its place in the shard.
        key: its name in the shard, without extension.
        reason: one word (see `seer.data.decode.BadImage`), or `KILLED_WORKER`.
        stand_in: whether it was itself tried in the place of another.
    """

    shard: str
    sample: int
    key: str
    reason: str
    stand_in: bool = False


class Cut(NamedTuple):
    """Which sample the crops of an image come from, and where they lie in it.

    Attributes:
        shard, sample: numbers.
        boxes: (V, 4) int64: left, top, right, bottom in pixels of the upright image.
        flips: (V,) bool: mirrored left to right.
        bad: the samples that it replaces, the one whose turn it was first.
    """

    shard: int
    sample: int
    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    bad: list[BadSample]


@dataclass(frozen=True)
class Origin:
    """A `Cut` for people: the sample by its names, and its bytes.

    Attributes:
        shard, sample, key: as of a `BadSample`.
        name: of its class, its number where no name is known, "" for none.
        data: the image's file.
        boxes, flips, bad: as of the `Cut`.
    """

    shard: str
    sample: int
    key: str
    name: str
    data: bytes
    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    bad: list[BadSample]


class _Place(NamedTuple):
    row: int
    shard: int
    sample: int


def _to_nobody(row: int, shard: int, sample: int) -> None:
    pass


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
        limits: which images are refused.
        decoder: what makes the crops, one of `seer.decoders.DECODERS` that is installed.

    Attributes:
        decoder: as given.
        quarantine: (shard, sample) of what is replaced without being opened, because processes died of it.
        announce: is told row, shard and sample of what is worked on next; sample -1: the shard is being read.
    """

    def __init__(
        self,
        shards: ShardList,
        order: GrowingOrder | MixedOrder,
        *,
        seed: int,
        slots: Int64s,
        specs: Sequence[CropSpec],
        flip_probability: float,
        photometric: PhotometricSpec,
        limits: ImageLimits = DEFAULT_LIMITS,
        decoder: str = "pillow",
    ) -> None:
        self._shards, self._order, self._seed, self._slots = shards, order, seed, slots
        self._specs, self._flip_probability, self._photometric = list(specs), flip_probability, photometric
        self._reader = ShardReader(shards.reading)
        self._limits, self._crops = limits, sum(spec.count for spec in specs)
        self._ahead = self._read_ahead()
        self.decoder = decoder
        self.quarantine: set[tuple[int, int]] = set()
        self.announce: Callable[[int, int, int], None] = _to_nobody

    @property
    def images(self) -> int:
        """Images of a batch of this rank: N."""
        return len(self._slots)

    @property
    def resolutions(self) -> int:
        """How many sizes of crops there are."""
        return len(self._specs)

    @property
    def layout(self) -> list[tuple[tuple[int, ...], type[np.uint8] | type[np.float32]]]:
        """Shape and type of the arrays of a batch: the crops of each resolution, (count x N, S, S, 3) uint8, then the
        photometric parameters of each, (count x N, P) float32.
        """
        rows = [spec.count * self.images for spec in self._specs]
        return [
            *(((count, spec.size, spec.size, 3), np.uint8) for count, spec in zip(rows, self._specs, strict=True)),
            *(((count, photometric_parameters.COLUMNS), np.float32) for count in rows),
        ]

    def prepare_worker(self) -> None:
        """Loads the decoder's libraries, so that an image is not blamed for the time that this takes."""
        cutter_of(self.decoder)

    def shard_path(self, shard: int) -> str:
        """The tar of a shard's number, as it is told."""
        return shown(self._shards.listed[shard].location)

    def expect(self, batch_index: int, rows: range) -> None:
        """Asks for what `fill` will need of remote shards; returns at once.

        These are images of shards that are read in parts, and indexes that were not loaded yet.
        """
        if self._ahead is not None:
            self._ahead.want(self._expected(batch_index, rows))

    def _expected(self, batch_index: int, rows: range) -> Iterator[tuple[tuple[int, int], int, int]]:
        for row, shard, sample in self._places(batch_index, rows):
            if (shard, sample) not in self.quarantine:
                if self._reader.apart(self._shards.listed[shard]):
                    yield (batch_index, row), shard, sample
                elif not self._shards.is_loaded(shard) and is_remote(self._shards.listed[shard].location):
                    yield (batch_index, row), shard, INDEX_ALONE

    def fill(
        self, batch_index: int, rows: range, crops_out: Sequence[UInt8s], parameters_out: Sequence[Float32s]
    ) -> list[BadSample]:
        """Writes some images of a batch; the same bytes however a batch is cut into ranges.

        Args:
            rows: which of the N images.
            crops_out, parameters_out: one array a resolution, of `layout`; rows [v*N, (v+1)*N) belong to crop v.

        Returns:
            the samples that could not be used, by rows: those that stood there, each with its stand-ins behind it.

        Raises:
            UserError: a shard cannot be read, or too many images in a row cannot be decoded.
        """
        return [sample for cut in self.cut(batch_index, rows, crops_out, parameters_out) for sample in cut.bad]

    def cut(
        self, batch_index: int, rows: range, crops_out: Sequence[UInt8s], parameters_out: Sequence[Float32s]
    ) -> list[Cut]:
        """As `fill`, and says what was cut, by rows."""
        self.expect(batch_index, rows)
        slots = self._slots[rows.start : rows.stop]
        self._draw_parameters(batch_index, rows, slots, parameters_out)
        numbers = uniforms(self._seed, "crops", batch_index, slots, self._crops, crops.DRAWS)
        places = self._places(batch_index, rows)
        cuts: list[Cut] = []
        try:
            for start in range(0, len(places), _ROWS_AT_ONCE):
                part = slice(start, start + _ROWS_AT_ONCE)
                cuts += self._cut_rows(batch_index, places[part], numbers[part], crops_out)
        finally:
            if self._ahead is not None:
                self._ahead.forget((batch_index, row) for row in rows)
        return cuts

    def first(self, images: int) -> BatchAssembler:
        """Makes the first so many images of this rank's part of any batch, with a reader of its own."""
        part = copy.copy(self)
        part._slots, part._reader = self._slots[:images], ShardReader(self._shards.reading)
        part._ahead, part.announce = part._read_ahead(), _to_nobody
        return part

    def _read_ahead(self) -> ReadAhead | None:
        away = any(is_remote(shard.location) for shard in self._shards.listed)
        return ReadAhead(self._shards, self._reader.request, self._limits.max_bytes) if away else None

    def origins(self, cuts: Sequence[Cut]) -> list[Origin]:
        """What was cut, by its names; reads the files again.

        Raises:
            UserError: as `fill`.
        """

        @cache
        def classes(folder: str) -> list[str]:
            return (shard_manifest.read(folder) or {}).get("classes") or []

        return [
            Origin(
                self.shard_path(cut.shard),
                cut.sample,
                self._reader.key(shard, cut.sample),
                shard_manifest.class_name(
                    classes(shard_manifest.folder_of(shard.location)), int(shard.labels[cut.sample])
                ),
                self._reader.read(shard, cut.sample),
                cut.boxes,
                cut.flips,
                cut.bad,
            )
            for cut in cuts
            for shard in [self._shards[cut.shard]]
        ]

    def _places(self, batch_index: int, rows: range) -> list[_Place]:
        shards, samples = self._order.positions(batch_index, self._slots[rows.start : rows.stop])
        return [_Place(*place) for place in zip(rows, shards.tolist(), samples.tolist(), strict=True)]

    def _draw_parameters(self, batch_index: int, rows: range, slots: Int64s, out: Sequence[Float32s]) -> None:
        draws = photometric_parameters.DRAWS
        numbers = uniforms(self._seed, "photometric", batch_index, slots, self._crops, draws).swapaxes(0, 1)
        found = photometric_parameters.photometric_parameters(numbers.reshape(-1, draws), self._photometric)
        by_crop, first = found.reshape(self._crops, len(slots), -1), 0
        for spec, rows_out in zip(self._specs, out, strict=True):
            every = rows_out.reshape(spec.count, self.images, -1)
            every[:, rows.start : rows.stop] = by_crop[first : first + spec.count]
            first += spec.count

    def _cut_rows(
        self, batch_index: int, places: list[_Place], numbers: NDArray[np.float64], out: Sequence[UInt8s]
    ) -> list[Cut]:
        # Headers first: the boxes of all images are then found in one go, and a JPEG is decoded no larger than needed.
        opened = deque(self._open(place, batch_index) for place in places)
        self.announce(-1, -1, -1)
        plan = self._plan(opened, numbers)
        cuts: list[Cut] = []
        for index, place in enumerate(places):
            # Taken out: one decoded image at a time.
            found = self._cut(place, opened.popleft(), plan, index, out)
            if isinstance(found, BadSample):
                found = self._substitute(batch_index, place, found, numbers[index : index + 1], out)
            cuts.append(found)
        return cuts

    def _open(self, place: _Place, batch_index: int | None = None) -> OpenedImage | BadSample:
        """An image, with its header read; with a batch's number the one that was expected for the row."""
        if (place.shard, place.sample) in self.quarantine:
            return self._bad(place, KILLED_WORKER)
        self.announce(place.row, place.shard, -1)
        alive = partial(self.announce, place.row, place.shard, -1)
        try:
            data = None
            if self._ahead is not None and batch_index is not None:
                data = self._ahead.take((batch_index, place.row), alive)
            if data is None:
                shard = self._shards[place.shard]
                self._limits.refuse_bytes(int(shard.sizes[place.sample]))  # before it is read
                data = self._reader.read(shard, place.sample, alive)
            self.announce(*place)
            return open_image(data, self._limits)
        except BadImage as error:
            return self._bad(place, error.reason)

    def _plan(self, opened: Iterable[OpenedImage | BadSample], numbers: NDArray[np.float64]) -> crops.CropPlan:
        sizes = [image.size if isinstance(image, OpenedImage) else (1, 1) for image in opened]
        return crops.plan_crops(np.array(sizes, np.int64), self._specs, numbers, self._flip_probability)

    def _cut(
        self,
        place: _Place,
        image: OpenedImage | BadSample,
        plan: crops.CropPlan,
        index: int,
        out: Sequence[UInt8s],
    ) -> Cut | BadSample:
        """Writes the crops of an opened image, or says why there are none."""
        if isinstance(image, BadSample):
            return image
        self.announce(*place)
        scale, boxes, flips = float(plan.scales[index]), plan.boxes[index], plan.flips[index]
        try:
            cutter_of(self.decoder)(image, scale, boxes, flips, self._specs, out, place.row)
        except BadImage as error:
            return self._bad(place, error.reason)
        return Cut(place.shard, place.sample, boxes, flips, [])

    def _substitute(
        self, batch_index: int, place: _Place, failed: BadSample, numbers: NDArray[np.float64], out: Sequence[UInt8s]
    ) -> Cut:
        """Writes the crops of another image."""
        bad: list[BadSample] = []
        for shard, sample in self._candidates(batch_index, place.shard, place.sample):
            other = _Place(place.row, shard, sample)
            image = self._open(other)
            found = self._cut(other, image, self._plan([image], numbers), 0, out)
            if isinstance(found, Cut):
                return found._replace(bad=[failed, *bad])
            bad.append(replace(found, stand_in=True))
        raise UserError(
            f"shard {failed.shard}, sample {failed.sample} cannot be decoded ({failed.reason})",
            f"nor can {len(bad)} others in its place (the last one: {bad[-1].reason})" if bad else "there is no other",
            "pack the folder again without them",
        )

    def _bad(self, place: _Place, reason: str) -> BadSample:
        self.announce(place.row, place.shard, -1)  # its name is read: that may take longer than decoding
        key = self._reader.key(self._shards[place.shard], place.sample)
        return BadSample(self.shard_path(place.shard), place.sample, key, reason)

    def _candidates(self, batch_index: int, shard: int, sample: int) -> Iterator[tuple[int, int]]:
        counts = self._order.counts
        for step in range(1, min(_CANDIDATES, int(counts[shard]) - 1) + 1):
            yield shard, (sample + step) % int(counts[shard])
        for other in islice(self._order.others(batch_index, shard), _SHARDS_TRIED):
            for first in range(min(_CANDIDATES, int(counts[other]))):
                yield other, first
