"""Mutated images, each a function of its number, and the process that decodes them: under limits, as data workers do.

    python tests/hostile_images.py FIRST COUNT FOLDER DECODER

decodes the images FIRST to FIRST + COUNT by Pillow, and by DECODER as the samples of a shard in FOLDER. It may use
``MEMORY`` bytes of address space and ``SECONDS`` of processor time an image: whoever is beyond is killed, and the last
line says by which number. At the end it prints one JSON object: images by what became of them, and the peak of memory.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
from crafted_images import chunk
from evaluation_shards import shard
from image_cases import CASES
from PIL import Image

from seer.data.assembly import BatchAssembler
from seer.data.crops import CropSpec
from seer.data.cutters import cutter_of
from seer.data.decode import BadImage, open_image
from seer.data.growth import GrowingOrder
from seer.data.photometric_parameters import PhotometricSpec
from seer.shard_list import ShardList

MEMORY = 2 << 30
SECONDS = 20.0

SEEDS = [data for data, _, _ in CASES.values()]
_TOGETHER = 64  # images a shard

Rng = np.random.Generator


def mutated(number: int) -> bytes:
    """One to three mutations of a seed."""
    rng = np.random.default_rng(number)
    data = SEEDS[rng.integers(len(SEEDS))]
    for _ in range(rng.integers(1, 4)):
        data = _MUTATIONS[rng.integers(len(_MUTATIONS))](data, rng)
    return _with_checksums(data) if rng.integers(2) else data


def _place(data: bytes, rng: Rng) -> int:
    """One time in three near the beginning, where headers are."""
    return int(rng.integers(len(data) if rng.integers(3) else min(len(data), 200))) if data else 0


def _flip(data: bytes, rng: Rng) -> bytes:
    out = bytearray(data)
    for _ in range(rng.integers(1, 9) if data else 0):
        out[_place(data, rng)] ^= int(rng.integers(1, 256))
    return bytes(out)


def _cut(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(len(data) + 1))]


def _splice(data: bytes, rng: Rng) -> bytes:
    other = SEEDS[rng.integers(len(SEEDS))]
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _fill(data: bytes, rng: Rng) -> bytes:
    at, length = _place(data, rng), int(rng.integers(1, 40))
    filling = (b"\0", b"\xff", b"\x7f")[rng.integers(3)] * length
    return data[:at] + filling + data[at + (length if rng.integers(2) else 0) :]


def _repeat(data: bytes, rng: Rng) -> bytes:
    start = _place(data, rng)
    piece = data[start : start + int(rng.integers(1, 100))]
    return data[:start] + piece * int(rng.integers(2, 400)) + data[start:]


def _grow(data: bytes, rng: Rng) -> bytes:
    """Another number where a small one stands in the header: mostly a side of the image, often both of them."""
    form = (">I", "<I", ">H", "<H")[rng.integers(4)]
    size, most = struct.calcsize(form), 256 ** struct.calcsize(form) - 1
    places = [at for at in range(min(len(data), 400) - size) if 8 <= struct.unpack_from(form, data, at)[0] <= 100]
    if not places:
        return data
    at = places[rng.integers(len(places))]
    number = min(most, int((300, 5000, 8000, 29_999, 65_535, 2**31 - 1, 2**32 - 1)[rng.integers(7)]))
    fields = 2 if rng.integers(2) and at + size in places else 1
    return data[:at] + struct.pack(form, number) * fields + data[at + fields * size :]


def _swap(data: bytes, rng: Rng) -> bytes:
    """Parts in another order, some of them twice or not at all."""
    head, parts = _parts(data, rng)
    return head + b"".join(parts[place] for place in rng.integers(0, len(parts), len(parts))) if parts else head


def _parts(data: bytes, rng: Rng) -> tuple[bytes, list[bytes]]:
    """Chunks of a PNG or a WebP, segments of a JPEG; of anything else pieces."""
    parts, at = [], 0
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 12 <= len(data):
            parts.append(data[at : at + 12 + int.from_bytes(data[at : at + 4], "big")])
            at += len(parts[-1])
        return data[:8], parts
    if data.startswith(b"RIFF"):
        at = 12
        while at + 8 <= len(data):
            length = int.from_bytes(data[at + 4 : at + 8], "little")
            parts.append(data[at : at + 8 + length + length % 2])
            at += len(parts[-1])
        return data[:12], parts
    if data.startswith(b"\xff\xd8"):
        at = 2
        while data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
            parts.append(data[at : at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))])
            at += len(parts[-1])
        return data[:2], [*parts, data[at:]]
    cuts = sorted({0, len(data), *rng.integers(0, len(data) + 1, 5).tolist()})
    return b"", [data[start:end] for start, end in pairwise(cuts)]


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose checksums are right again, or a damaged one would never get further than them."""
    if not data.startswith(b"\x89PNG"):
        return data
    head, parts = _parts(data, np.random.default_rng(0))
    mended = [chunk(part[4:8], part[8:-4]) for part in parts]
    if mended and mended[0][4:8] == b"IHDR" and zlib.crc32(data) % 2:  # data enough for many more pixels
        mended.insert(1, chunk(b"IDAT", zlib.compress(bytes(1 << 20))))
    return head + b"".join(mended)


_MUTATIONS = (_flip, _flip, _cut, _splice, _fill, _repeat, _grow, _grow, _swap)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def fate(data: bytes, scale: float = 1.0) -> str:
    """``good``, or why not."""
    try:
        opened = open_image(data)
        image = opened.load(scale)
    except BadImage as error:
        return error.reason
    assert image.mode == "RGB" and (scale < 1.0 or image.size == opened.size)
    assert len(image.tobytes()) == 3 * image.size[0] * image.size[1]
    return "good"


def _as_samples(images: list[bytes], folder: Path, decoder: str) -> dict[int, str]:
    """Which of the images an assembler of batches replaces and why, when each of them is asked for once."""
    tar = shard(folder / "shard.tar", [(image, -1) for image in images])
    specs = [CropSpec(1, 24, 0.3, 1.0)]
    order = GrowingOrder(np.array([len(images)]), seed=0, global_batch_size=len(images))
    slots = np.arange(len(images))
    assembler = BatchAssembler(
        ShardList([tar]),
        order,
        seed=0,
        slots=slots,
        specs=specs,
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        decoder=decoder,
    )
    out = [np.zeros(shape, dtype) for shape, dtype in assembler.layout]
    bad = assembler.fill(0, range(len(images)), out[: assembler.resolutions], out[assembler.resolutions :])
    return {sample.sample: sample.reason for sample in bad}


def main(first: int, count: int, folder: Path, decoder: str) -> None:
    cutter_of(decoder)  # may import torch, which takes its own address space
    memory = MEMORY + (_address_space() if decoder == "simplejpeg" else 0)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.init()
    before = 0 if decoder != "simplejpeg" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    fates, slowest, compared = Counter[str](), (0.0, 0), 0
    for start in range(first, first + count, _TOGETHER):
        images = [mutated(number) for number in range(start, min(start + _TOGETHER, first + count))]
        found = []
        for number, image in enumerate(images, start):
            print(number, flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
            began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            found.append(fate(image))
            slowest = max(slowest, (resource.getrusage(resource.RUSAGE_SELF).ru_utime - began, number))
        signal.setitimer(signal.ITIMER_PROF, SECONDS * len(images))
        # A good one behind each: somebody has to take the places of the others.
        replaced = _as_samples([part for image in images for part in (image, SEEDS[0])], folder, decoder)
        expected = {2 * place: what for place, what in enumerate(found) if what != "good"}
        assert replaced == expected, (start, sorted(replaced.items() ^ expected.items()))
        compared += len(images)
        fates.update(found)
    signal.setitimer(signal.ITIMER_PROF, 0)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    print(json.dumps({"fates": fates, "compared": compared, "peak": peak, "slowest": slowest}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
