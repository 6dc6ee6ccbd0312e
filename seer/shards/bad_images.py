"""Which images cannot be used, by name: the shard, the sample's key, and where the image came from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from seer import remote
from seer.shards.archives import parsed_note
from seer.shards.index import samples_of
from seer.shards.processes import each

_LONGEST_NOTE = 1 << 20


class BadImage(NamedTuple):
    """An image by its place: path or address of the tar, its first byte in it, and why it cannot be used."""

    tar: str
    offset: int
    reason: str


class Named(NamedTuple):
    """A bad image as people find it.

    Attributes:
        shard: path or address of the tar.
        key: of its sample; None in a remote tar, of which only images are read.
        path: as the sample's JSON tells it, else None.
        reason: why it cannot be used.
    """

    shard: str
    key: str | None
    path: str | None
    reason: str


def named(images: Sequence[BadImage], workers: int = 1) -> list[Named]:
    """The names of some images, in their order; the headers of the tars in which they lie are read once each.

    Raises:
        DamagedTar, UserError: see `seer.shards.tar.members`.
    """
    offsets: dict[str, set[int]] = {}
    for image in images:
        if not remote.is_remote(image.tar):
            offsets.setdefault(image.tar, set()).add(image.offset)
    known: dict[tuple[str, int], tuple[str, str | None]] = {}
    for (tar, _), names in each(_names, list(offsets.items()), workers):
        known |= {(tar, offset): name for offset, name in names.items()}
    found = []
    for image in images:
        key, path = known.get((image.tar, image.offset), (None, None))
        found.append(Named(image.tar, key, path, image.reason))
    return found


def _names(job: tuple[str, set[int]]) -> dict[int, tuple[str, str | None]]:
    """Offset of an image -> key and path."""
    tar, offsets = job
    found = {}
    file = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for sample in samples_of(Path(tar)):
            for suffix, member in sample:
                if member.offset in offsets:
                    key = member.name[: -len(suffix) - 1]
                    notes = [other for word, other in sample if word == "json" and other.size <= _LONGEST_NOTE]
                    note = parsed_note(os.pread(file, notes[0].size, notes[0].offset)) if notes else {}
                    path = note.get("path")
                    found[member.offset] = key, path if isinstance(path, str) else None
    finally:
        os.close(file)
    return found
