"""A process beside each rank that brings remote shards into the cache before the workers ask for them.

It follows the order: what the current windows of its rank's lanes use comes first, then the next windows'. Workers do
not depend on it: what it has not brought yet they fetch themselves, and if it dies it is started again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from seer.data.growth import GrowingOrder
from seer.data.mixture import MixedOrder
from seer.data.order import Int64s
from seer.data.ring import memory_file
from seer.data.shard_cache import ShardCache, say
from seer.data.worker import leave_signals_to_the_parent
from seer.errors import UserError, shown
from seer.remote import Reading, is_remote
from seer.shard_list import ListedShard

_AT_ONCE = 4  # downloads
# Whoever needs a shard now has more patience: meanwhile its lock should be free.
_PATIENCE_SECONDS = 10.0
_AGAIN_SECONDS = 5.0  # after which what could not be had, or had no room, is tried again
_RESTART_SECONDS = 10.0
_PACE_SECONDS = 0.1
_SOON = 4  # batches whose shards come before the others of their window


class Briefing(NamedTuple):
    """What a fetcher works on: all shards, their order, the places of the batch that its rank makes."""

    shards: Sequence[ListedShard]
    order: GrowingOrder | MixedOrder
    slots: Int64s
    reading: Reading
    tells: bool


class Fetcher:
    """Starts the process, and tells it where the rank is.

    Args:
        briefing: what it works on; one that `tells` says on stderr what has no room.
        first: number of the first batch.

    Raises:
        UserError: the cache's folder cannot be used.
    """

    def __init__(self, briefing: Briefing, first: int) -> None:
        ShardCache(briefing.reading)  # a folder that cannot be used is told here
        self._owner, self._at, self._started = os.getpid(), first, 0.0
        self._file = memory_file()
        with open(self._file, "wb", closefd=False) as file:
            pickle.dump(briefing, file)
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def at(self, batch_index: int) -> None:
        """The rank has come to this batch."""
        self._at = batch_index
        if self._process.poll() is not None:
            if time.monotonic() - self._started > _RESTART_SECONDS:
                self._close_pipe()
                self._process = self._start()
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is slow or dead: the next batch tells it as well
            os.write(self._process.stdin.fileno(), b"%d\n" % batch_index)

    def close(self) -> None:
        """Ends the process."""
        if os.getpid() != self._owner:
            return
        self._process.kill()
        self._process.wait()
        self._close_pipe()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _start(self) -> subprocess.Popen[bytes]:
        code = f"import sys; sys.path[:] = {sys.path!r}; from seer.data import fetching; "
        code += f"fetching.serve({self._file}, {self._at}, {os.getpid()})"
        self._started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=(self._file,), process_group=0
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _close_pipe(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()


def briefing_of(
    shards: Sequence[ListedShard], order: GrowingOrder | MixedOrder, slots: Int64s, reading: Reading, *, tells: bool
) -> Briefing | None:
    """What a fetcher would work on; None where nothing is to be fetched."""
    if reading.cache_bytes == 0 or not any(is_remote(shard.location) for shard in shards):
        return None
    return Briefing(shards, order, slots, reading, tells)


# What runs in the process.


def serve(briefing_file: int, first: int, parent: int) -> None:
    """Fetches until its standard input ends; lines of it are the batches that the rank has come to."""
    leave_signals_to_the_parent(parent)
    with mmap.mmap(briefing_file, 0, prot=mmap.PROT_READ) as written:
        briefing: Briefing = pickle.loads(written)
    try:
        _follow(briefing, first)
    except (UserError, OSError) as error:  # the rank goes on without it
        if briefing.tells:
            say(f"shards are not fetched ahead for now ({shown(str(error))})")
        os._exit(1)


def _follow(briefing: Briefing, at: int) -> None:
    cache = ShardCache(briefing.reading, say if briefing.tells else None)
    downloads = _Downloads(cache)
    planned: tuple[list[int], list[int]] | None = None
    received = b""
    while True:
        plan = _plan(briefing, at)
        if plan != planned or not cache.is_published():
            now, later = ([briefing.shards[number] for number in numbers] for numbers in plan)
            cache.publish(now, later)
            planned = plan
            downloads.want([*_soon(briefing, at, plan), *now, *later])
        elif downloads.idle:
            downloads.want([briefing.shards[number] for numbers in plan for number in numbers])
        if select.select([0], [], [], _AGAIN_SECONDS)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                os._exit(0)  # the rank has ended; a download under way is dropped
            *lines, received = (received + data).split(b"\n")
            at = int(lines[-1]) if lines else at
            time.sleep(_PACE_SECONDS)  # steps may be shorter than planning is worth


def _plan(briefing: Briefing, batch_index: int) -> tuple[list[int], list[int]]:
    """Numbers of the remote shards that the rank needs now, and of those that it needs next."""
    now, later = (
        [number for number in shards.tolist() if is_remote(briefing.shards[number].location)]
        for shards in briefing.order.windows(batch_index, briefing.slots)
    )
    known = set(now)
    return now, [number for number in later if number not in known]


def _soon(briefing: Briefing, batch_index: int, plan: tuple[list[int], list[int]]) -> list[ListedShard]:
    known = {number for numbers in plan for number in numbers}
    batches = range(batch_index, batch_index + _SOON)
    numbers = np.concatenate([briefing.order.positions(batch, briefing.slots)[0] for batch in batches]).tolist()
    return [briefing.shards[number] for number in dict.fromkeys(numbers) if number in known]


class _Downloads:
    """Several downloads at a time, in the order in which shards are wanted."""

    def __init__(self, cache: ShardCache) -> None:
        self._cache = cache
        self._wanted: deque[ListedShard] = deque()
        self._changed = threading.Condition()
        self._busy = 0
        for _ in range(_AT_ONCE):
            threading.Thread(target=self._work, daemon=True).start()

    @property
    def idle(self) -> bool:
        """Whether all that was wanted is there, or could not be had."""
        with self._changed:
            return not self._wanted and not self._busy

    def want(self, shards: Sequence[ListedShard]) -> None:
        """Replaces what was wanted before; what is there already costs nothing."""
        with self._changed:
            self._wanted = deque(dict.fromkeys(shards))
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._wanted:
                    self._changed.wait()
                shard = self._wanted.popleft()
                self._busy += 1
            try:
                if not self._cache.fetch(shard, _PATIENCE_SECONDS):
                    self._no_room()
            except (UserError, OSError):
                time.sleep(1.0)  # whoever needs it will tell; this one tries again
            finally:
                with self._changed:
                    self._busy -= 1

    def _no_room(self) -> None:
        with self._changed:
            self._wanted.clear()
        needed, bound = self._cache.needed_bytes(), self._cache.reading.cache_bytes
        if needed > bound:
            self._cache.tell_once(
                "room",
                f"data.cache_gb={bound / 1e9:.3g}: this machine needs {needed / 1e9:.3g} GB of shards at a time; images"
                " of those without room are read one by one: raise data.cache_gb or make data.window_images smaller",
            )
