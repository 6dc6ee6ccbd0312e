"""What a pack leaves out or makes smaller, and the report of it. Which images are kept does not depend on chance.

Exact duplicates have one digest of content. Near duplicates (another size, another compression) have perceptual hashes
(pHash of 64 bits, by the library imagehash) that differ in at most `NEAR_BITS` bits; cut-outs, mirrored and rotated
copies are not found by it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Resampling

from seer.errors import UserError
from seer.files import write_atomically
from seer.shards.formats import OpenImage
from seer.shards.inputs import read
from seer.shards.listing import Listing
from seer.shards.processes import Progress, each

REPORT = "dropped.jsonl"
NEAR_BITS = 4
QUALITY = 92
_CHUNK = 256  # images of one job
_HASHED_SIDE = 128  # pixels to which a JPEG is decoded at least before it is hashed (from 32 x 32)


@dataclass(frozen=True)
class Curation:
    """The wishes; the default has none.

    Attributes:
        open_image: bytes to an image; needed by everything but `drop_duplicates`.
        drop_duplicates: of images with the same bytes the first by path is kept.
        drop_near_duplicates: of images that look the same the one with the most pixels is kept.
        min_side: images whose shorter side has fewer pixels are dropped.
        longest_side: larger images are shrunk to this longer side and written as JPEG of quality 92.
    """

    open_image: OpenImage | None = None
    drop_duplicates: bool = False
    drop_near_duplicates: bool = False
    min_side: int | None = None
    longest_side: int | None = None

    @property
    def drops(self) -> bool:
        """Whether images may be left out."""
        return self.drop_duplicates or self.drop_near_duplicates or self.min_side is not None

    def options(self) -> dict[str, Any]:
        """The wishes that were made, for the manifest."""
        wishes = {
            "drop_duplicates": self.drop_duplicates,
            "drop_near_duplicates": NEAR_BITS if self.drop_near_duplicates else None,
            "min_side": self.min_side,
            "longest_side": self.longest_side,
        }
        return {word: value for word, value in wishes.items() if value}


OPTIONS = ("drop_duplicates", "drop_near_duplicates", "min_side", "longest_side")


@dataclass(frozen=True)
class Dropped:
    """An image that is left out.

    Attributes:
        place: in the listing.
        reason: duplicate, near_duplicate, too_small, or why it is no image.
        of: place of the image that it repeats; -1 for none.
    """

    place: int
    reason: str
    of: int = -1


def require_imagehash() -> Any:
    """The library of perceptual hashes.

    Raises:
        UserError: it is not installed.
    """
    try:
        import imagehash
    except ImportError:
        remedy = "pip install 'seer[dedup]', or drop exact duplicates only: --drop-duplicates"
        raise UserError("--drop-near-duplicates needs imagehash", "it is not installed", remedy) from None
    return imagehash


def dropped(listing: Listing, curation: Curation, workers: int, progress: Progress) -> list[Dropped]:
    """Which images are left out, by place.

    Raises:
        UserError: an image cannot be read, a library is missing.
    """
    if curation.drop_near_duplicates:
        require_imagehash()
    looks = curation.drop_near_duplicates or curation.min_side is not None
    # Equal bytes have equal sizes: where nothing else is asked, most images need not be read.
    places = np.arange(len(listing)) if looks else _sharing(listing.sizes)
    seen = _examined(listing, places, curation, workers, progress)
    gone: dict[int, Dropped] = {}
    if curation.drop_duplicates:
        first: dict[bytes, int] = {}
        for place in places.tolist():
            kept = first.setdefault(seen.digests[place], place)
            if kept != place:
                gone[place] = Dropped(place, "duplicate", kept)
    for place, reason in seen.reasons.items():
        gone.setdefault(place, Dropped(place, reason))
    if curation.drop_near_duplicates:
        left = [place for place in seen.hashes if place not in gone]
        for place, kept in near_duplicates(left, seen.hashes, seen.pixels):
            gone[place] = Dropped(place, "near_duplicate", kept)
    return [gone[place] for place in sorted(gone)]


def _sharing(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of the sizes that occur more than once."""
    _, group, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[group] > 1)


def near_duplicates(places: Sequence[int], hashes: dict[int, int], pixels: dict[int, int]) -> Iterator[tuple[int, int]]:
    """(dropped, kept): every image within `NEAR_BITS` of one that is kept; those with more pixels are kept first.

    Two hashes that differ in 4 bits agree on at least one of 5 bands, so only images that share a band are compared.
    """
    kept: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for place in sorted(places, key=lambda place: (-pixels[place], place)):
        own = hashes[place]
        bands = list(_bands(own))
        near = (
            (distance, other)
            for band in bands
            for other in kept[band]
            if (distance := (hashes[other] ^ own).bit_count()) <= NEAR_BITS
        )
        closest = min(near, default=None)
        if closest is None:
            for band in bands:
                kept[band].append(place)
        else:
            yield place, closest[1]


def _bands(number: int) -> Iterator[tuple[int, int]]:
    bands = NEAR_BITS + 1
    width = -(-64 // bands)
    for band in range(bands):
        yield band, number >> (band * width) & ((1 << width) - 1)


@dataclass(frozen=True)
class _Chunk:
    places: list[int]
    images: Listing
    curation: Curation


@dataclass
class _Seen:
    """By place: digest of the content, why it is no usable image, perceptual hash, number of pixels."""

    digests: dict[int, bytes]
    reasons: dict[int, str]
    hashes: dict[int, int]
    pixels: dict[int, int]


def _examined(
    listing: Listing, places: NDArray[np.int64], curation: Curation, workers: int, progress: Progress
) -> _Seen:
    chunks = [
        _Chunk(part.tolist(), listing.take(part), curation)
        for part in (places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK))
    ]
    whole = _Seen({}, {}, {}, {})
    done, total = 0, int(listing.sizes[places].sum())
    for chunk, seen in each(_examine, chunks, workers):
        whole.digests |= seen.digests
        whole.reasons |= seen.reasons
        whole.hashes |= seen.hashes
        whole.pixels |= seen.pixels
        done += int(chunk.images.sizes.sum())
        progress(done, total)
    return whole


def _examine(chunk: _Chunk) -> _Seen:
    seen = _Seen({}, {}, {}, {})
    images, wishes = chunk.images, chunk.curation
    for row, place in enumerate(chunk.places):
        data = bytes_of(images, row)
        if wishes.drop_duplicates:
            seen.digests[place] = hashlib.blake2b(data, digest_size=16).digest()
        if wishes.open_image is None or not (wishes.drop_near_duplicates or wishes.min_side is not None):
            continue
        try:
            opened = wishes.open_image(data)
            width, height = opened.size
            if wishes.min_side is not None and min(width, height) < wishes.min_side:
                seen.reasons[place] = "too_small"
            elif wishes.drop_near_duplicates:
                seen.hashes[place] = _perceptual_hash(opened.load(min(1.0, _HASHED_SIDE / min(width, height))))
                seen.pixels[place] = width * height
        except Exception as error:
            seen.reasons[place] = _reason(error)
    return seen


def _perceptual_hash(image: Image.Image) -> int:
    bits = require_imagehash().phash(image).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _reason(error: Exception) -> str:
    """Why an image is bad; whatever else went wrong is raised again."""
    reason = getattr(error, "reason", None)
    if reason is None:
        raise error
    return str(reason)


def bytes_of(images: Listing, row: int) -> bytes:
    """The bytes of one image of a listing."""
    source = images.sources[int(images.source[row])]
    crc = int(images.stamps[row]) if source.kind == "zip" else None
    return read(source, images.names[row], int(images.offsets[row]), int(images.sizes[row]), crc)


def shrunk(data: bytes, longest_side: int, open_image: OpenImage) -> bytes | None:
    """A JPEG of the image with this longer side; None where it is no larger, or no image that can be decoded.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is enough. The result stands upright, in RGB.
    """
    try:
        opened = open_image(data)
        width, height = opened.size
        scale = longest_side / max(width, height)
        if scale >= 1:
            return None
        image = opened.load(scale)
    except Exception as error:
        _reason(error)
        return None  # as it is: training replaces it by another, and says so
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = io.BytesIO()
    image.resize(size, Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_report(folder: Path, listing: Listing, gone: Sequence[Dropped]) -> None:
    """FOLDER/dropped.jsonl: path, reason, and of which image it is a duplicate; one object a line."""
    lines = []
    for image in gone:
        line = {"path": listing.paths[image.place], "reason": image.reason}
        if image.of >= 0:
            line["duplicate_of"] = listing.paths[image.of]
        lines.append(json.dumps(line) + "\n")
    write_atomically(folder / REPORT, "".join(lines).encode("ascii"))


def read_report(folder: Path) -> dict[str, int]:
    """Reason -> how many, of a report that was written before."""
    counts: defaultdict[str, int] = defaultdict(int)
    for line in (folder / REPORT).read_text("ascii").splitlines():
        counts[json.loads(line)["reason"]] += 1
    return dict(counts)
