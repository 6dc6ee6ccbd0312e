"""Reads the headers of a tar: which regular files lie where. Damage is an error with its place, never a shorter list.

Python's tarfile ends quietly at a bad header or at the end of a file that was cut between two members; a training set
would shrink without a word. This walk checks every header's checksum and demands the final zero block. It costs a few
microseconds a member. Formats: v7, ustar with prefix, GNU long names and base-256 sizes, pax (path and size, per file
and global). Links, folders, devices and sparse files are passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from seer.errors import UserError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax records; anything longer is nonsense
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR = (b"0", b"\0", b"7")
# Mode, owner, group, time, device: of no interest, but where one is no number tarfile (so webdataset) ends its list.
_OTHER_NUMBERS = ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345))
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: their size field counts nothing


class Member(NamedTuple):
    """A regular file in a tar: its name, the place of its first byte, its bytes."""

    name: str
    offset: int
    size: int


class DamagedTar(UserError):
    """A tar that was cut or altered.

    Args:
        path: the tar.
        offset: the byte where the walk met something impossible.
        why: what it met.
    """

    def __init__(self, path: str | Path, offset: int, why: str) -> None:
        self.path, self.offset, self.why = path, offset, why
        super().__init__(f"{path} is damaged at byte {offset}", why, "copy the tar again or make it anew")

    def __reduce__(self) -> tuple[type, tuple[str | Path, int, str]]:  # type: ignore[override]
        return type(self), (self.path, self.offset, self.why)


class _Impossible(Exception):
    """A field of a header that cannot be right."""


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base 256: 0x80 and a big-endian number (0xff would be a negative one)
        if field[0] != 0x80:
            raise _Impossible("a negative size")
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not digits:
        return 0
    # int() would also take 0o7, 1_0 and +7.
    if digits.translate(None, b"01234567"):
        raise _Impossible("a number that is none")
    return int(digits, 8)


def _check(header: bytes) -> None:
    for start, end in _OTHER_NUMBERS:
        if header[start] != 0xFF:  # a negative one, such as a time before 1970
            _number(header[start:end])
    stored = _number(header[148:156])
    if sum(header) - sum(header[148:156]) + 8 * 32 == stored:
        return
    # Some old tars summed signed characters.
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:]) + 8 * 32
    if signed != stored:
        raise _Impossible("a header whose checksum is wrong")


def _pax_records(data: bytes) -> dict[str, str]:
    records = {}
    while data.strip(b"\0"):
        length, separator, _ = data.partition(b" ")
        if not separator or not length.isdigit() or not len(length) + 2 < int(length) <= len(data):
            raise _Impossible("a pax record that is none")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        word, equals, value = record[:-1].partition(b"=")
        if record[-1:] != b"\n" or not equals or not word:
            raise _Impossible("a pax record that is none")
        records[word.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    return records


class _Extended:
    """What extended headers said of the next member (L, x) or of all members from here on (g)."""

    def __init__(self) -> None:
        self._lasting: dict[str, str] = {}
        self._records: dict[str, str] = {}
        self._long_name = ""
        self.pending = False  # whether something was said of a member that is still to come

    def take(self, kind: bytes, content: bytes, padding: bytes) -> None:
        self.pending |= kind != b"g"
        # Readers differ in which of two names they take, and in where a name ends that does not end in its own bytes.
        if kind == b"L":
            if self._long_name or "path" in self._records or _text(content) != _text(content + padding):
                raise _Impossible("a name that can be read in two ways")
            self._long_name = _text(content)
            if not self._long_name:
                raise _Impossible("a name of no characters")
        elif kind == b"g":
            self._lasting |= _pax_records(content)
        elif kind != b"K":  # the long target of a link is of no interest
            records = _pax_records(content)
            if self._records or (self._long_name and "path" in records):
                raise _Impossible("a name that can be read in two ways")
            self._records = records

    def apply(self, header: bytes) -> tuple[str, int, bool]:
        """Name, size and whether the member is sparse; forgets what held for this member alone."""
        known = self._lasting | self._records
        size = known.get("size", "")
        if size and not (size.isascii() and size.isdigit()):
            raise _Impossible("a pax size that is none")
        name = known.get("path", "").rstrip("/") or self._long_name
        if not name:
            name = _text(header[:100])
            if header[257:263] == b"ustar\0" and header[345]:
                name = f"{_text(header[345:500])}/{name}"
            elif header[345]:  # no prefix (GNU's incremental archives keep a time there), but tarfile takes it for one
                raise _Impossible("a name that can be read in two ways")
        sparse = header[156:157] == b"S" or _is_sparse(known)
        self._records, self._long_name, self.pending = {}, "", False
        return name, int(size) if size else _number(header[124:136]), sparse


def _is_sparse(known: dict[str, str]) -> bool:
    """Whether pax records describe a sparse file: forms 0.0, 0.1 and 1.0 of GNU tar."""
    if "GNU.sparse.map" in known or "GNU.sparse.size" in known:
        return True
    if (known.get("GNU.sparse.major"), known.get("GNU.sparse.minor")) == ("1", "0"):
        return True
    if any(word.startswith("GNU.sparse.") for word in known):
        raise _Impossible("a sparse file of an unknown form")
    return False


def _read(file: int, size: int, offset: int, what: str) -> bytes:
    content = os.pread(file, size, offset)
    if len(content) < size:
        raise _Impossible(f"the file ends {what}")
    return content


def _end_of_sparse_map(file: int, header: bytes, data: int) -> int:
    """In GNU's old sparse form the map of 12-byte numbers goes on in further blocks before the data."""
    numbers, more = header[386:482] + header[483:495], header[482]
    while True:
        for at in range(0, len(numbers), 12):
            _number(numbers[at : at + 12])
        if not more:
            return data
        block = _read(file, BLOCK, data, "inside a sparse map")
        numbers, more = block[:504], block[504]
        data += BLOCK


def _walk(file: int, file_size: int) -> Iterator[Member | int]:
    """Members, and before each header its offset, so that the caller can say where an error arose."""
    offset, extended = 0, _Extended()
    if file_size == 0:
        raise _Impossible("the file is empty")
    while True:
        yield offset
        header = _read(file, BLOCK, offset, "without the zero block that closes a tar")
        if header == _ZEROS:
            if extended.pending:
                raise _Impossible("a name or pax records without their member")
            break
        _check(header)
        kind, data = header[156:157], offset + BLOCK
        if kind in b"LKxgX":
            size = _number(header[124:136])
            if size > _MAX_EXTENDED:
                raise _Impossible("a name or pax records of over a megabyte")
            content = _read(file, size, data, "inside a name")
            extended.take(kind, content, os.pread(file, -size % BLOCK, data + size))
        else:
            name, size, sparse = extended.apply(header)
            if sparse and kind == b"S":
                data = _end_of_sparse_map(file, header, data)
            if kind in _WITHOUT_DATA:
                size = 0
            if data + size > file_size:
                raise _Impossible("the file ends inside a member")
            if kind in _REGULAR and not sparse and not (kind == b"\0" and name.endswith("/")):
                yield Member(name, data, size)
        offset = data + -(-size // BLOCK) * BLOCK
    while rest := os.pread(file, 1 << 20, offset):
        if rest.strip(b"\0"):
            raise _Impossible("something stands behind the block that closes a tar (two tars joined by cat?)")
        offset += len(rest)


def _compressed(path: Path, start: bytes) -> UserError | None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            rule = f"it is compressed ({name}), so nothing in it can be reached without reading all that stands before"
            return UserError(f"{path} is no plain tar", rule, "decompress it; images hardly shrink by it anyway")
    return None


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar in their order, links and sparse files left out.

    Raises:
        DamagedTar: a header that cannot be right, a file that ends too early or goes on behind its end.
        UserError: a compressed tar, a file that cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", "a shard is a tar file", "check the path"
        ) from None
    offset = 0
    try:
        for found in _walk(file, os.fstat(file).st_size):
            if isinstance(found, Member):
                yield found
            else:
                offset = found
    except _Impossible as error:
        if offset == 0 and (compressed := _compressed(path, os.pread(file, 6, 0))):
            raise compressed from None
        raise DamagedTar(path, offset, str(error)) from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", "a shard is a tar file", "check the disk"
        ) from None
    finally:
        os.close(file)
