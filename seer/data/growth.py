"""Shards that join while a run goes on: which sample stands where, before and after (numpy only).

A run's batches fall into *chapters*. In each, the order is that of a run over all shards that have joined by then, with
the epochs counted on; it begins where an epoch of the chapter before ends. So no batch that was made before changes,
and an epoch takes each sample of its chapter once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from seer.data.order import Int64s, ShardOrder, UInt64s, Unmixed


class Chapter(NamedTuple):
    """Where shards joined: the first global batch that may hold their images, and the epoch that it begins."""

    first_batch: int
    first_epoch: int


class Growth(NamedTuple):
    """How a list of shards came together.

    Attributes:
        chapters: by their first batch; the first one begins at batch 0 and epoch 0.
        joined: (S,) int64, the chapter that each shard came with.
    """

    chapters: Sequence[Chapter]
    joined: Int64s


class GrowingOrder:
    """The order of samples of a list of shards that did not all come at once; of one chapter, that of `ShardOrder`.

    Args:
        counts: (S,) samples of each shard of the list as it is now; the shards of a chapter stand in it in the sequence
            that they had then, whatever came between them.
        growth: how the list came together; None: all at once.
        seed, global_batch_size, lanes, window: as for `ShardOrder`, in all chapters.

    Attributes:
        counts, samples: of each shard of the list, and of all.
        sizes: the first batch of each chapter, and the samples that are in it.
        global_batch_size, lanes: as given.

    Raises:
        UserError: from `ShardOrder`, for the first chapter: the later ones are larger.
    """

    def __init__(
        self,
        counts: Sequence[int] | Int64s,
        growth: Growth | None = None,
        *,
        seed: int,
        global_batch_size: int,
        lanes: int = 1,
        window: int | None = None,
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        self.global_batch_size, self.lanes = global_batch_size, lanes
        self._seed, self._window = seed, window
        self._chapters, self._joined = growth or Growth([Chapter(0, 0)], np.zeros(len(self.counts), np.int64))
        self._first_batches = [chapter.first_batch for chapter in self._chapters]
        samples = np.cumsum(np.bincount(self._joined, self.counts, len(self._chapters)).astype(np.int64))
        self.sizes = list(zip(self._first_batches, samples.tolist(), strict=True))
        self._cached_chapter = -1
        self._enter(0)

    def positions(self, batch_index: int, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Where the images of some slots of a global batch lie: as `ShardOrder.positions`, in the list as it is now."""
        order, number = self._in_chapter(batch_index)
        shard, sample = order.positions(number, slots)
        return self._shards[shard], sample

    def unmixed(self, batch_index: int, slots: Int64s) -> Unmixed:
        """The first part of `positions`: as `ShardOrder.unmixed`."""
        order, number = self._in_chapter(batch_index)
        return order.unmixed(number, slots)

    def located(self, unmixed: Unmixed, mixed: UInt64s) -> tuple[Int64s, Int64s]:
        """The last part of `positions`, of the batch that was asked for last: as `ShardOrder.located`."""
        shard, sample = self._order.located(unmixed, mixed)
        return self._shards[shard], sample

    def windows(self, batch_index: int, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Which shards the lanes of some slots use now and next: as `ShardOrder.windows`.

        What joins is not among the next ones until its chapter has begun.
        """
        order, number = self._in_chapter(batch_index)
        now, after = order.windows(number, slots)
        return self._shards[now], self._shards[after]

    def others(self, batch_index: int, shard: int) -> Iterator[int]:
        """The other shards that a batch could hold images of, beginning after this one; empty ones are left out."""
        self._enter(batch_index)
        shards = self._shards
        place = int(np.searchsorted(shards, shard))
        for step in range(1, len(shards)):
            other = int(shards[(place + step) % len(shards)])
            if self.counts[other]:
                yield other

    def epochs(self, batch_index: int) -> float:
        """Passes over the data, as it was in each of them, before a batch."""
        chapter = self._enter(batch_index)
        return chapter.first_epoch + (batch_index - chapter.first_batch) / self._order.batches_per_epoch

    def next_epoch(self, batch_index: int) -> Chapter:
        """The first epoch that begins at a batch or after it: what joins then is a chapter."""
        chapter = self._enter(batch_index)
        epochs = -(-(batch_index - chapter.first_batch) // self._order.batches_per_epoch)
        first_batch = chapter.first_batch + epochs * self._order.batches_per_epoch
        return Chapter(first_batch, chapter.first_epoch + epochs)

    def _in_chapter(self, batch_index: int) -> tuple[ShardOrder, int]:
        """The order of a batch's chapter, and the number that the batch has in it."""
        chapter = self._enter(batch_index)
        return self._order, chapter.first_epoch * self._order.batches_per_epoch + batch_index - chapter.first_batch

    def _enter(self, batch_index: int) -> Chapter:
        """The chapter of a batch; its shards and their order stand ready."""
        number = bisect_right(self._first_batches, batch_index) - 1
        if number != self._cached_chapter:
            self._shards = np.flatnonzero(self._joined <= number)
            self._order = ShardOrder(
                self.counts[self._shards],
                seed=self._seed,
                global_batch_size=self.global_batch_size,
                lanes=self.lanes,
                window=self._window,
            )
            self._cached_chapter = number
        return self._chapters[number]
