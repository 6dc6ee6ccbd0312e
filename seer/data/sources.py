"""Bytes of a sample out of a tar shard: one positioned read, no parsing, files stay open."""

from __future__ import annotations

import os
from collections import OrderedDict

from seer.errors import UserError
from seer.shard_index import ShardIndex

# Far below the usual limit of 1,024 open files a process; opening again costs microseconds on a local disk.
_OPEN_FILES = 128


class ShardReader:
    """Reads samples; keeps the last few shards open. Each process needs its own."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: ShardIndex, sample: int) -> bytes:
        """The bytes of the image of one sample.

        Raises:
            UserError: the tar is gone, cannot be read, or is not the one that was indexed (its size differs).
        """
        size = int(shard.sizes[sample])
        try:
            data = os.pread(self._open(shard), size, int(shard.offsets[sample]))
        except OSError as error:
            raise UserError(
                f"shard {shard.location}",
                f"it cannot be read ({error.strerror or error})",
                "restore the file, then run the same command again",
            ) from None
        if len(data) != size:
            raise _changed(shard, "it ends inside a sample")
        return data

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, shard: ShardIndex) -> int:
        path = shard.location
        file = self._files.get(path)
        if file is not None:
            self._files.move_to_end(path)
            return file
        file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        size = os.fstat(file).st_size
        if size != shard.tar_size:
            os.close(file)
            raise _changed(shard, f"it has {size} bytes where its index says {shard.tar_size}")
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[path] = file
        return file


def _changed(shard: ShardIndex, how: str) -> UserError:
    return UserError(
        f"shard {shard.location}",
        f"{how}: truncated or changed since it was indexed",
        f"copy it again, or `seer shards index {shard.location}` if the change was meant",
    )


_reader = ShardReader()


def read_sample(shard: ShardIndex, sample: int) -> bytes:
    """`ShardReader.read` of this process's reader (positioned reads: a fork may share the open files)."""
    return _reader.read(shard, sample)
