"""Several sources in fixed shares: which sample of which source stands at which place of which batch (numpy only).

Every batch has the same number of images of each source. Each source keeps an order and an epoch of its own
(`seer.data.order`): a small one with a large share begins its next epoch sooner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seer.data.growth import GrowingOrder, Growth
from seer.data.order import GOLDEN, Int64s, ShardOrder, permuted
from seer.errors import UserError
from seer.keyed_random import key
from seer.remote import BY_DEFAULT, Reading
from seer.shard_list import ShardList
from seer.source_list import quotas, read_sources


class SourceShare(NamedTuple):
    """A source: its name, its weight (only ratios count), and how many of the shards are its own."""

    name: str
    weight: float
    shards: int


class MixedOrder:
    """The order of samples of several sources, with the interface of `GrowingOrder`; shards count through all sources.

    In every lane of a batch each source has its share of the places, scattered by a keyed permutation; they are filled
    from the same lane of the source.

    Args:
        counts: (S,) samples of each shard, one source after the other; zeros are allowed.
        sources: in the sequence of their shards; names are all different and key their orders.
        growths: how the shards of each source came together; none: all at once.
        seed, global_batch_size, lanes: as for `ShardOrder`.
        window: samples of a lane, of all sources together, that are mixed at a time, at most; None: all.

    Attributes:
        counts, samples: of each shard of all sources, and of all.
        quotas: images of each source in a batch.
        orders: of each source, by its name.

    Raises:
        UserError: from `ShardOrder`, a source whose share is less than a place in each lane, or one with fewer samples
            than a batch takes of it.
    """

    def __init__(
        self,
        counts: Sequence[int] | Int64s,
        sources: Sequence[SourceShare],
        growths: Sequence[Growth] = (),
        *,
        seed: int,
        global_batch_size: int,
        lanes: int = 1,
        window: int | None = None,
    ) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.global_batch_size, self.lanes = seed, global_batch_size, lanes
        if global_batch_size % lanes:
            ShardOrder(self.counts, seed=seed, global_batch_size=global_batch_size, lanes=lanes)  # it tells why not
        self._lane_slots = global_batch_size // lanes
        shares = quotas([source.weight for source in sources], self._lane_slots)
        self._ends = np.cumsum(shares)
        self._first_shard = np.cumsum([0, *(source.shards for source in sources)])
        self.quotas = [share * lanes for share in shares]
        self.orders: dict[str, GrowingOrder] = {}
        for number, (source, share) in enumerate(zip(sources, shares, strict=True)):
            first = self._first_shard[number]
            own = self.counts[first : first + source.shards]
            part = f"its share of {self._lane_slots} places" + f" (a lane of {lanes})" * (lanes > 1)
            if share == 0:
                raise UserError(
                    f"source {source.name} of data.mixture",
                    f"{part} is none",
                    "give it a larger weight, or use larger batches",
                )
            if own.sum() < share * lanes:
                raise UserError(
                    f"source {source.name} of data.mixture holds {own.sum()} images",
                    f"a batch takes {share * lanes} of it",
                    "give it a smaller weight, or name more shards",
                )
            self.orders[source.name] = GrowingOrder(
                own,
                growths[number] if growths else None,
                seed=int(key(seed, "source", source.name)),
                global_batch_size=share * lanes,
                lanes=lanes,
                # Windows of all sources then last equally long.
                window=None if window is None else -(-window * share // self._lane_slots),
            )

    def positions(self, batch_index: int, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Where the images of some slots of a global batch lie: as `GrowingOrder.positions`."""
        lane, slot = np.divmod(np.asarray(slots, np.int64), self._lane_slots)
        keys = key(self.seed, "scatter", batch_index) + lane.astype(np.uint64) * GOLDEN
        place = permuted(slot.astype(np.uint64), self._lane_slots, keys).astype(np.int64)
        source = np.searchsorted(self._ends, place, side="right")
        shard, sample = np.empty_like(place), np.empty_like(place)
        orders = list(self.orders.values())
        at = [np.flatnonzero(source == number) for number in range(len(orders))]
        unmixed = []
        for number, order in enumerate(orders):
            share = order.global_batch_size // self.lanes
            of_source = lane[at[number]] * share + place[at[number]] - (self._ends[number] - share)
            unmixed.append(order.unmixed(batch_index, of_source))
        # One call for all sources: what it costs grows with calls more than with places.
        mixed = permuted(*(np.concatenate(parts) for parts in zip(*(one[2:] for one in unmixed), strict=True)))
        ends = np.cumsum([len(places) for places in at])[:-1]
        for number, part in enumerate(np.split(mixed, ends)):
            found, sample[at[number]] = orders[number].located(unmixed[number], part)
            shard[at[number]] = found + self._first_shard[number]
        return shard, sample

    def windows(self, batch_index: int, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Which shards the lanes of some slots use now and next: as `GrowingOrder.windows`, source by source."""
        lanes = np.unique(np.asarray(slots, np.int64) // self._lane_slots)
        now, after = [], []
        for order, first in zip(self.orders.values(), self._first_shard, strict=False):
            current, following = order.windows(batch_index, lanes * (order.global_batch_size // self.lanes))
            now.append(current + first)
            after.append(following + first)
        return np.concatenate(now), np.concatenate(after)

    def others(self, batch_index: int, shard: int) -> Iterator[int]:
        """The other shards of the same source: as `GrowingOrder.others`."""
        number = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        first = int(self._first_shard[number])
        for other in list(self.orders.values())[number].others(batch_index, shard - first):
            yield first + other

    def epochs(self, batch_index: int) -> float:
        """How often there were as many images before a batch as all sources held together by then."""
        starts = sorted({first for order in self.orders.values() for first, _ in order.sizes} | {batch_index})
        found = 0.0
        for first, end in pairwise(starts[: starts.index(batch_index) + 1]):
            samples = sum(
                max((start, size) for start, size in order.sizes if start <= first)[1] for order in self.orders.values()
            )
            found += (end - first) / max(1, samples // self.global_batch_size)
        return found


def order_of(
    counts: Int64s,
    sources: Sequence[SourceShare],
    growths: Sequence[Growth] = (),
    *,
    seed: int,
    global_batch_size: int,
    lanes: int = 1,
    window: int | None = None,
) -> GrowingOrder | MixedOrder:
    """The order of one list of shards, or, where sources are named, of their mixture; growths: of it, or of each."""
    if sources:
        return MixedOrder(
            counts, sources, growths, seed=seed, global_batch_size=global_batch_size, lanes=lanes, window=window
        )
    growth = growths[0] if growths else None
    return GrowingOrder(counts, growth, seed=seed, global_batch_size=global_batch_size, lanes=lanes, window=window)


def open_shards(
    patterns: Sequence[str],
    mixture: Sequence[str],
    index_dir: Path | None = None,
    reading: Reading = BY_DEFAULT,
    *,
    growing: bool = False,
) -> tuple[ShardList, list[SourceShare]]:
    """The shards to train on, one source after the other, and the sources (none where `mixture` names none).

    Args:
        patterns: of one list of shards (`data.shards`).
        mixture: or several sources instead (`data.mixture`).
        index_dir: folder of the indexes; None: beside the tars.
        reading: how remote shards are read.
        growing: shards of packs that have not ended may be left out (`data.allow_growth`).

    Raises:
        UserError: as `ShardList.open` and `read_sources`.
    """
    sources = read_sources(mixture)
    if not sources:
        return ShardList.open(patterns, index_dir, reading, growing=growing), []
    lists = [ShardList.open(source.pattern, index_dir, reading, growing=growing) for source in sources]
    shares = [SourceShare(source.name, source.weight, len(one)) for source, one in zip(sources, lists, strict=True)]
    return ShardList.joined(lists), shares
