"""Images behind addresses, asked for before they are opened: several requests at a time, in order (free of torch).

Threads live as long as there is something to ask for. So nothing has to be closed, and a process at rest has none.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from seer.shard_index import ShardIndex
from seer.shard_list import ShardList

# A worker makes up to 300 images a second: enough requests to keep it busy at a latency of 100 ms.
AT_ONCE = 32
INDEX_ALONE = -1  # in the place of a sample: nothing but the index of its shard
MOST_BYTES = 1 << 26  # asked for or waiting to be opened; a single image may be larger

Key = tuple[int, int]
"""Batch and row that an image is for."""
Request = Callable[[ShardIndex, int], bytes]
"""Reads a sample of a shard; called in threads."""


@dataclass(eq=False)
class _Wanted:
    """An image on its way.

    Attributes:
        begun, listed, ended: whether a thread has taken it up, its shard's index is there, nothing more will come.
        held: bytes that it takes of the bound.
        data: what came; None: nobody asked, since it is larger than images may be, or the index was all.
    """

    shard: int
    sample: int
    begun: bool = False
    listed: bool = False
    ended: bool = False
    dropped: bool = False
    held: int = 0
    data: bytes | None = None
    error: BaseException | None = None


class ReadAhead:
    """What was wanted, in the order in which it was. A pickled one begins anew.

    Args:
        shards: their indexes are loaded here too.
        request: reads an image.
        largest: bytes of an image beyond which it is not asked for.
    """

    def __init__(self, shards: ShardList, request: Request, largest: int) -> None:
        self._shards, self._request, self._largest = shards, request, largest
        self._changed = threading.Condition()
        self._wanted: dict[Key, _Wanted] = {}
        self._waiting: deque[_Wanted] = deque()
        self._threads = self._held = 0
        self._answered = False

    def __reduce__(self) -> tuple[type[ReadAhead], tuple[ShardList, Request, int]]:
        return ReadAhead, (self._shards, self._request, self._largest)

    def want(self, images: Iterable[tuple[Key, int, int]]) -> None:
        """Asks for images, (key, shard, sample or `INDEX_ALONE`), after those that it knows of; returns at once."""
        with self._changed:
            for key, shard, sample in images:
                if key not in self._wanted:
                    self._wanted[key] = wanted = _Wanted(shard, sample)
                    self._waiting.append(wanted)
            for _ in range(min(len(self._waiting), AT_ONCE - self._threads)):
                try:
                    threading.Thread(target=self._work, daemon=True).start()
                except RuntimeError:  # this process may have no more: those that it has do the work, or `take` says no
                    break
                self._threads += 1

    def take(self, key: Key, alive: Callable[[], None]) -> bytes | None:
        """An image that was asked for, and forgets it.

        Args:
            alive: called when the index is there and the image itself is waited for.

        Returns:
            None: it was not asked for, is too large, or only its index was: it is to be read in the usual way.

        Raises:
            UserError: it cannot be read.
        """
        with self._changed:
            wanted = self._wanted.get(key)
            if wanted is None:
                return None
            told = False
            while not wanted.ended and (wanted.begun or self._threads):
                self._changed.wait()
                if wanted.listed and not told:
                    told = True
                    alive()
            self._drop(key)
        if wanted.error is not None:
            raise wanted.error
        return wanted.data

    def forget(self, keys: Iterable[Key]) -> None:
        """Nobody will take these any more."""
        with self._changed:
            for key in keys:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        wanted = self._wanted.pop(key, None)
        if wanted is not None:
            wanted.dropped = True
            if not wanted.begun:
                self._waiting.remove(wanted)
            if wanted.ended:
                self._release(wanted)
            self._changed.notify_all()

    def _release(self, wanted: _Wanted) -> None:
        self._held -= wanted.held
        wanted.held = 0

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                wanted = self._waiting.popleft()
                wanted.begun = True
            try:
                wanted.data = self._read(wanted)
            except BaseException as error:
                wanted.error = error
            with self._changed:
                wanted.ended = True
                if wanted.dropped or wanted.data is None:
                    self._release(wanted)
                elif wanted.held:
                    self._answered = True
                self._changed.notify_all()

    def _read(self, wanted: _Wanted) -> bytes | None:
        shard = self._shards[wanted.shard]
        if wanted.sample == INDEX_ALONE:
            return None
        size = int(shard.sizes[wanted.sample])
        with self._changed:
            wanted.listed = True
            self._changed.notify_all()
            if size > self._largest:
                return None
            self._changed.wait_for(lambda: wanted.dropped or self._has_room(wanted, size))
            if wanted.dropped:
                return None
            wanted.held = size
            self._held += size
        return self._request(shard, wanted.sample)

    def _has_room(self, wanted: _Wanted, size: int) -> bool:
        # The next one to be taken has its turn whatever the others hold: nobody else can go on. And it goes alone until
        # a server has answered: one that knows no ranges sends whole shards, and one that refuses is asked once.
        if wanted is next(iter(self._wanted.values())):
            return True
        return self._answered and self._held + size <= MOST_BYTES
