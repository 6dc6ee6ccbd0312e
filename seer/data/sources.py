"""Bytes of a sample out of a tar shard: one positioned read, no parsing, files stay open.

A shard behind an address is brought into the cache as a whole and read there; where it has no room, each image is a
request.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
from collections import OrderedDict
from collections.abc import Callable

from seer import remote
from seer.data.shard_cache import ShardCache, Tar, nothing
from seer.errors import UserError
from seer.remote import BY_DEFAULT, Reading
from seer.shard_index import ShardIndex

# Far below the usual limit of 1,024 open files a process; opening again costs microseconds on a local disk.
_OPEN_FILES, _OPEN_SHARE = 128, 4
_BLOCK = 512  # of a tar: a header takes one
_SIZE_FIELD = slice(124, 136)  # of a header, in octal digits
_PAX_PATH = re.compile(rb"(?:^|\n)\d+ path=([^\n]*)\n")


class ShardReader:
    """Reads samples; keeps the last few shards open. Each process needs its own: a pickled one begins anew.

    Args:
        reading: how remote shards are read.
        tell: gets a sentence where they are read in another way than asked; by default nobody.
    """

    def __init__(self, reading: Reading = BY_DEFAULT, tell: Callable[[str], None] | None = None) -> None:
        self._reading, self._tell = reading, tell
        # A limit may be lower: a share of it leaves the others for what else the process opens.
        self._most = max(1, min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _OPEN_SHARE))
        self._files: OrderedDict[str, int] = OrderedDict()
        self._cache: ShardCache | None = None
        self._compared: set[str] = set()

    def read(self, shard: ShardIndex, sample: int, alive: Callable[[], None] = nothing) -> bytes:
        """The bytes of the image of one sample.

        Args:
            alive: called now and then while a shard is fetched.

        Raises:
            UserError: the tar is gone, cannot be read, or is not the one that was indexed (its size differs, or what
                stands before the image; of one that is fetched as a whole, its bytes).
        """
        offset, size = int(shard.offsets[sample]), int(shard.sizes[sample])
        data = self._bytes(shard, offset, size, alive)
        if not remote.is_remote(shard.location):  # others are compared when they are fetched
            self._refuse_another_tar(shard, offset, size)
        return data

    def apart(self, shard: Tar) -> bool:
        """Whether images of a shard are requests of their own for now: it is remote and has no room in the cache."""
        if not remote.is_remote(shard.location) or shard.location in self._files:
            return False
        return self._reading.cache_bytes == 0 or (self._cache is not None and not self._cache.may_have_room(shard))

    def request(self, shard: ShardIndex, sample: int) -> bytes:
        """The bytes of the image of one sample of a shard that is `apart`. Threads may call it.

        Raises:
            UserError: as `read`.
        """
        return self._part(shard, int(shard.offsets[sample]), int(shard.sizes[sample]))

    def key(self, shard: ShardIndex, sample: int) -> str:
        """What WebDataset calls a sample: the image's name in the tar, up to the first dot behind the last slash.

        Of a name that takes more than a block of 512 bytes (GNU, pax) only what the plain header holds is known.

        Raises:
            UserError: as `read`.
        """
        end = int(shard.offsets[sample])
        start = max(0, end - 3 * _BLOCK)
        name = _name(self._bytes(shard, start, end - start, nothing)).decode("utf-8", "replace")
        folder, slash, file = name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    def _bytes(self, shard: ShardIndex, offset: int, size: int, alive: Callable[[], None]) -> bytes:
        try:
            file = self._open(shard, alive)
            if file is None:
                return self._part(shard, offset, size)
            data = os.pread(file, size, offset)
        except OSError as error:
            raise _unreadable(shard, error) from None
        if len(data) != size:
            raise _changed(shard, "it ends inside a sample")
        return data

    def _refuse_another_tar(self, shard: ShardIndex, offset: int, size: int) -> None:
        """A tar that took the place of the one that was indexed has the same size by chance, but not its headers."""
        start = max(0, offset - _BLOCK)
        header = self._bytes(shard, start, offset - start, nothing)
        if header[_SIZE_FIELD].strip(b" \0").lstrip(b"0") == (b"%o" % size).lstrip(b"0"):
            return
        if shard.location in self._compared:
            return
        try:
            with open(shard.location, "rb") as tar:  # pax records may overrule a header, so the bytes decide
                digest = hashlib.file_digest(tar, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError as error:
            raise _unreadable(shard, error) from None
        if digest != shard.tar_digest:
            raise _changed(shard, "its bytes are others than those that were indexed")
        self._compared.add(shard.location)

    def _part(self, shard: ShardIndex, offset: int, size: int) -> bytes:
        return remote.read_range(shard.location, offset, size, size=shard.tar_size, patience=self._reading.patience)

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __reduce__(self) -> tuple[type[ShardReader], tuple[Reading]]:
        return ShardReader, (self._reading,)

    def _open(self, shard: ShardIndex, alive: Callable[[], None]) -> int | None:
        """A file to read from, kept open; None: the shard is remote and has no room in the cache."""
        path = shard.location
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        file = self._open_remote(shard, alive) if remote.is_remote(path) else _open_local(shard)
        if file is None:
            return None
        if len(self._files) >= self._most:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = file
        return file

    def _open_remote(self, shard: ShardIndex, alive: Callable[[], None]) -> int | None:
        alive()  # its index may have been fetched just now
        if self._reading.cache_bytes == 0:
            return None
        if self._cache is None:
            self._cache = ShardCache(self._reading, self._tell)
        # What was evicted takes its space until it is closed.
        for path in [path for path, file in self._files.items() if os.fstat(file).st_nlink == 0]:
            os.close(self._files.pop(path))
        return self._cache.open(shard, alive)


def _name(blocks: bytes) -> bytes:
    """The name of a member of a tar by the last blocks before it; the file is sound, it was indexed."""
    extended, long, header = (blocks[-at : len(blocks) - at + _BLOCK] for at in (3 * _BLOCK, 2 * _BLOCK, _BLOCK))
    kind = extended[156:157] if extended[257:262] == b"ustar" else b""
    if kind == b"L" and b"\0" in long:
        return long.partition(b"\0")[0]
    if kind == b"x" and (path := _PAX_PATH.search(long)):
        return path[1]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return b"/".join(filter(None, (prefix, header[:100].partition(b"\0")[0])))


def _open_local(shard: ShardIndex) -> int:
    file = os.open(shard.location, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    size = os.fstat(file).st_size
    if size != shard.tar_size:
        os.close(file)
        raise _changed(shard, f"it has {size} bytes where its index says {shard.tar_size}")
    return file


def _unreadable(shard: ShardIndex, error: OSError) -> UserError:
    return UserError(
        f"shard {shard.location}",
        f"it cannot be read ({error.strerror or error})",
        "restore the file, then run the same command again",
    )


def _changed(shard: ShardIndex, how: str) -> UserError:
    return UserError(
        f"shard {shard.location}",
        f"{how}: truncated or changed since it was indexed",
        f"copy it again, or `seer shards index {shard.location}` if the change was meant",
    )
