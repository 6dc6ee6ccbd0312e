"""The shared memory of data workers: batches in their slots, and what each worker is at (free of torch)."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seer.data.assembly import BatchAssembler


class At(NamedTuple):
    """What a worker is at: a count that grows whenever that changes; -1 for what there is not."""

    beat: int
    row: int
    shard: int
    sample: int


class Slot(NamedTuple):
    """The arrays of a batch, one of each kind a resolution (`BatchAssembler.layout`)."""

    crops: list[NDArray[np.uint8]]
    photometric: list[NDArray[np.float32]]


class Ring:
    """Shared memory: what each worker is at, then the slots.

    It is a file without a name (memfd): it is gone with the last process that has it open, however that ends, and
    /dev/shm, which is small in containers, has no part in it.
    """

    def __init__(self, assembler: BatchAssembler, slots: int, workers: int, file: int | None = None) -> None:
        self.slots, self.workers = slots, workers
        page = mmap.PAGESIZE
        sizes = [_rounded(int(np.prod(shape)) * np.dtype(kind).itemsize, 64) for shape, kind in assembler.layout]
        head, size = _rounded(64 * workers, page), _rounded(sum(sizes), page)
        if file is None and workers:
            file = memory_file()
            os.ftruncate(file, head + slots * size)
        self.file = -1 if file is None else file
        memory = mmap.mmap(self.file, head + slots * size)  # lives as long as an array that looks at it
        self.memory = np.frombuffer(memory, np.uint8)
        self._at = np.frombuffer(memory, np.int64, 8 * workers).reshape(workers, 8)
        self._slots = []
        for number in range(slots):
            arrays: list[NDArray[Any]] = []
            place = head + number * size
            for (shape, kind), length in zip(assembler.layout, sizes, strict=True):
                arrays.append(np.frombuffer(memory, kind, int(np.prod(shape)), place).reshape(shape))
                place += length
            self._slots.append(Slot(arrays[: assembler.resolutions], arrays[assembler.resolutions :]))

    def slot(self, batch_index: int) -> Slot:
        """Where a batch lies; the batch that comes as many later as there are slots lies there too."""
        return self._slots[batch_index % self.slots]

    def announce(self, worker: int, row: int, shard: int, sample: int) -> None:
        """By a worker: what it is at from now on (see `At`)."""
        cell = self._at[worker]
        cell[3] = -1  # whoever is killed in the middle of this is at nothing
        cell[1], cell[2] = row, shard
        cell[3] = sample
        cell[0] += 1

    def at(self, worker: int) -> At:
        """What a worker is at, or was when it died."""
        return At(*self._at[worker, :4].tolist())

    def close(self) -> None:
        """Closes the file; the memory stays as long as an array looks at it."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def _rounded(size: int, to: int) -> int:
    return -(-size // to) * to


def memory_file() -> int:
    """A file without a name: it is gone with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("seer-batches", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
