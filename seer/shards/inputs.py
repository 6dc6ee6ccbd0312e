"""Where images come from: files below a folder, members of a tar or of a zip. Each is (source, name, offset, bytes)."""

from __future__ import annotations

import os
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from seer.errors import UserError

LARGEST = 2**32 - 1
_STORED, _DEFLATED = 0, 8
ZIP_METHODS = (_STORED, _DEFLATED)
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Source:
    """A folder or an archive.

    Attributes:
        kind: how its images are read.
        path: absolute.
        prefix: what stands before an image's name to tell it from those of other sources; "" for the only folder.
    """

    kind: Literal["folder", "tar", "zip"]
    path: str
    prefix: str = ""


@dataclass
class Finds:
    """Images of one source as they are met: one entry in every column an image (columns, since there may be millions).

    Attributes:
        names: file below the folder, or member of the archive.
        paths: where the image came from in the first place, for people; differs from `names` in tars that tell it.
        sizes: bytes.
        offsets: first byte in a tar, local header in a zip, else 0.
        stamps: changes when the content does: time of change in ns, or CRC-32.
        labels: class name or number as it was written; "" for none.
        notes, note_sizes: first byte and bytes of the image's JSON in a tar; 0 bytes for none.
        classes: names of numbered classes, where the source tells them.
        left_out: reason -> how many.
    """

    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    stamps: array[int] = field(default_factory=lambda: array("q"))
    labels: list[str] = field(default_factory=list)
    notes: array[int] = field(default_factory=lambda: array("q"))
    note_sizes: array[int] = field(default_factory=lambda: array("q"))
    classes: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        name: str,
        size: int,
        stamp: int,
        *,
        path: str = "",
        offset: int = 0,
        label: str = "",
        note: tuple[int, int] = (0, 0),
    ) -> None:
        """Takes an image, or counts why not: one that is empty or too large for an index."""
        if not 0 < size <= LARGEST:
            self.left_out["files of 4 GiB or more" if size else "empty files"] += 1
            return
        self.names.append(name)
        self.paths.append(path or name)
        self.sizes.append(size)
        self.offsets.append(offset)
        self.stamps.append(stamp)
        self.labels.append(label)
        self.notes.append(note[0])
        self.note_sizes.append(note[1])


def read(source: Source, name: str, offset: int, size: int, crc: int | None = None) -> bytes:
    """The bytes of an image.

    Args:
        source: where it lies.
        name, offset, size: as in `Finds`.
        crc: CRC-32 of the content, where it is known.

    Raises:
        UserError: it is gone or no longer what it was when it was listed.
    """
    path = os.path.join(source.path, name) if source.kind == "folder" else source.path
    where = path if source.kind == "folder" else f"{name} in {path}"
    try:
        if source.kind == "folder":
            data = _file(path)
        elif source.kind == "tar":
            data = _part(path, offset, size)
        else:
            data = _zipped(path, offset, size)
    except (OSError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{where} cannot be read ({why})", "it was there before", "mend or move it") from None
    if len(data) != size or (crc is not None and zlib.crc32(data) != crc):
        if source.kind == "zip":
            raise UserError(f"{where} is damaged", "it is not what the zip's directory says", "copy the zip again")
        raise UserError(f"{where} changed while it was packed", "the input must stand still", "run the command again")
    return data


def _file(path: str) -> bytes:
    # A third of the time that open() takes: for small images that is most of it.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(file).st_size
        data = os.read(file, size + 1)
        while len(data) < size and (more := os.read(file, size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def _part(path: str, offset: int, size: int) -> bytes:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(file, size, offset)
    finally:
        os.close(file)


def _zipped(path: str, offset: int, size: int) -> bytes:
    """A member by its local header: zipfile would read the whole directory again in every process."""
    with open(path, "rb") as file:
        file.seek(offset)
        header = file.read(30)
        if header[:4] != b"PK\3\4":
            return b""
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), os.SEEK_CUR)
        if int.from_bytes(header[8:10], "little") == _STORED:
            return file.read(size)
        inflate, data = zlib.decompressobj(-zlib.MAX_WBITS), bytearray()
        while not inflate.eof and len(data) <= size:
            chunk = file.read(_CHUNK)
            if not chunk:
                break
            # One byte more than there should be, so that a member that grew is noticed without inflating all of it.
            data += inflate.decompress(chunk, size + 1 - len(data))
        return bytes(data)
