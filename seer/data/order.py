"""Which sample stands at which place of which batch: pure arithmetic, numpy only, no state that must be saved.

An epoch is a keyed permutation of all samples, cut into whole batches. Any batch of any epoch is found directly, in
memory proportional to the number of shards: a run resumes anywhere, and ranks and workers need not talk to each other.

Where shards are fetched as a whole, *lanes* let neighbouring slots of a batch (a rank, a node) read shards of their
own, and *windows* bound how many of them are needed at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from seer.errors import UserError
from seer.keyed_random import key, splitmix64

_ROUNDS = 4
# A Feistel network over few elements is a poor permutation; so few are cheap to sort.
_SORT_BELOW = 1024
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's own step between keys that shall be unrelated

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]


class Unmixed(NamedTuple):
    """Slots of a batch before their windows are permuted.

    Attributes:
        epoch: of the batch.
        firsts: (n,) int64, where each slot's window begins among the samples of the epoch.
        places, sizes, keys: (n,), of the slot in its window, of the window, and of its permutation.
    """

    epoch: int
    firsts: Int64s
    places: UInt64s
    sizes: Int64s
    keys: UInt64s


class ShardOrder:
    """The order of samples: batch b, slot i -> (shard, sample in the shard), a pure function of the arguments.

    The shards of an epoch stand in a keyed order, turned by a keyed offset and cut into ``lanes`` equal segments. Slot
    i belongs to lane i // (global_batch_size / lanes) and is filled from that segment, whose windows follow each other;
    in a window the samples are permuted. One lane and one window: a permutation of everything.

    Tail: an epoch has ``batches_per_epoch`` batches, on every rank. Within it no sample comes twice; fewer than
    ``global_batch_size + lanes`` samples (the remainder) do not come at all, other ones in each epoch: each sample is
    left out equally rarely.

    Args:
        counts: (S,) samples of each shard; zeros are allowed.
        seed: the run's seed.
        global_batch_size: images of a batch, over all ranks.
        lanes: segments that fill their own slots of each batch; a divisor of global_batch_size.
        window: samples of a lane that are mixed at a time, at most; None: all.

    Attributes:
        counts, samples: of each shard (S,), and of all.
        batches_per_epoch: whole batches in a pass over the data.

    Raises:
        UserError: there are fewer samples than one batch needs, or lanes that do not divide a batch.
    """

    def __init__(
        self,
        counts: Sequence[int] | Int64s,
        *,
        seed: int,
        global_batch_size: int,
        lanes: int = 1,
        window: int | None = None,
    ) -> None:
        if global_batch_size % lanes:
            raise UserError(
                f"data.lanes={lanes} with train.global_batch_size={global_batch_size}",
                "each lane fills equally many places of a batch",
                f"use a divisor of {global_batch_size}, such as {math.gcd(lanes, global_batch_size)}",
            )
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.global_batch_size, self.lanes = seed, global_batch_size, lanes
        self._lane_samples, self._lane_slots = self.samples // lanes, global_batch_size // lanes
        self.batches_per_epoch = self._lane_samples // self._lane_slots
        if self.batches_per_epoch == 0:
            raise UserError(
                f"{self.samples} samples in {len(self.counts)} shard{'s' * (len(self.counts) != 1)}",
                f"one batch needs {global_batch_size} (train.global_batch_size)",
                "name more shards or take a smaller batch",
            )
        # Equal windows: a short last one would mix little.
        windows = 1 if window is None else -(-self._lane_samples // window)
        self._window = -(-self._lane_samples // windows)
        self._cached_epoch = -1
        self._shard_at: Int64s = np.empty(0, np.int64)
        self._ends: Int64s = np.empty(0, np.int64)

    def positions(self, batch_index: int, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Where the images of some slots of a global batch lie.

        Args:
            batch_index: the global batch, from 0, counted over epochs.
            slots: (n,) int64 places in the batch, in [0, global_batch_size).

        Returns:
            shard (n,) int64, and sample in that shard (n,) int64.
        """
        unmixed = self.unmixed(batch_index, slots)
        return self.located(unmixed, permuted(unmixed.places, unmixed.sizes, unmixed.keys))

    def unmixed(self, batch_index: int, slots: Int64s) -> Unmixed:
        """The first part of `positions`: which places of which windows some slots have, before these are permuted."""
        epoch, batch = divmod(batch_index, self.batches_per_epoch)
        lane, slot = np.divmod(np.asarray(slots, np.int64), self._lane_slots)
        window, place = np.divmod(batch * self._lane_slots + slot, self._window)
        first = window * self._window
        sizes = np.minimum(self._lane_samples - first, self._window)
        numbers = (lane.astype(np.uint64) << np.uint64(32)) | window.astype(np.uint64)
        keys = key(self.seed, "order", epoch) + numbers * GOLDEN
        return Unmixed(epoch, lane * self._lane_samples + first, place.astype(np.uint64), sizes, keys)

    def located(self, unmixed: Unmixed, mixed: UInt64s) -> tuple[Int64s, Int64s]:
        """The last part of `positions`: shard and sample, once the places (n,) within their windows are permuted."""
        self._enter(unmixed.epoch)
        # The batches cover the first places only: turned by another offset each epoch, the remainder changes.
        offset = int(key(self.seed, "offset", unmixed.epoch)) % self.samples
        place = (unmixed.firsts + mixed.astype(np.int64) + offset) % self.samples
        at = np.searchsorted(self._ends, place, side="right")
        shard = self._shard_at[at]
        return shard, place - (self._ends[at] - self.counts[shard])

    def windows(self, batch_index: int, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Which shards the lanes of some slots use: for their whole current window, then for the window after it.

        A batch that ends in another window than it begins in has both as its current one.

        Args:
            batch_index, slots: as for `positions`.

        Returns:
            two arrays of different shards, in the order of the epoch; a shard may be in both.
        """
        epoch, batch = divmod(batch_index, self.batches_per_epoch)
        first, last = batch * self._lane_slots // self._window, ((batch + 1) * self._lane_slots - 1) // self._window
        now = [(epoch, window) for window in range(first, last + 1)]
        places_left = (last + 1) * self._window < self.batches_per_epoch * self._lane_slots
        after = [(epoch, last + 1) if places_left else (epoch + 1, 0)]
        lanes = np.unique(np.asarray(slots, np.int64) // self._lane_slots).tolist()
        return self._shards_of(now, lanes), self._shards_of(after, lanes)

    def _shards_of(self, windows: Sequence[tuple[int, int]], lanes: Sequence[int]) -> Int64s:
        found = []
        for epoch, window in windows:
            self._enter(epoch)
            offset = int(key(self.seed, "offset", epoch)) % self.samples
            first = window * self._window
            size = min(self._lane_samples - first, self._window)
            for lane in lanes:
                start = (lane * self._lane_samples + first + offset) % self.samples
                # Turned by the offset, a window may go on at the beginning.
                for begin, end in ((start, min(start + size, self.samples)), (0, start + size - self.samples)):
                    if begin < end:
                        at = np.searchsorted(self._ends, [begin, end - 1], side="right")
                        found.append(self._shard_at[at[0] : at[1] + 1])
        shards = np.concatenate(found)
        _, places = np.unique(shards, return_index=True)
        shards = shards[np.sort(places)]
        return shards[self.counts[shards] > 0]

    def _enter(self, epoch: int) -> None:
        """The shards in the order of the epoch, and where each ends in their concatenation."""
        if epoch != self._cached_epoch:
            self._shard_at = sorted_permutation(len(self.counts), key(self.seed, "shards", epoch))
            self._ends = np.cumsum(self.counts[self._shard_at])
            self._cached_epoch = epoch


def sorted_permutation(size: int, permutation_key: np.uint64) -> Int64s:
    """A keyed permutation of range(size), by sorting hashes: for what is small enough to be held."""
    return np.argsort(_hash(np.arange(size, dtype=np.uint64), permutation_key), kind="stable")


def permuted(places: UInt64s, sizes: int | Int64s, keys: np.uint64 | UInt64s) -> UInt64s:
    """The images of some places under keyed permutations of range(size), without holding the permutations.

    A Feistel network permutes the next even power of two; what falls outside is sent through again until it falls
    inside (cycle walking: fewer than four times on average). Below 1,024 elements the permutation is sorted instead.

    Args:
        places: (n,) uint64, each below its size.
        sizes: of the permutation; or (n,), of each place's own.
        keys: of the permutation; or (n,), of each place's own.
    """
    sizes, keys = np.broadcast_to(sizes, places.shape), np.broadcast_to(keys, places.shape)
    images = places.copy()
    small = sizes < _SORT_BELOW
    if small.any():
        for size in np.unique(sizes[small]).tolist():
            for permutation_key in np.unique(keys[sizes == size]):
                at = (sizes == size) & (keys == permutation_key)
                images[at] = sorted_permutation(size, permutation_key)[places[at].astype(np.int64)]
    outside = np.flatnonzero(~small)
    # All windows of all sources walk together: a step costs the same for few numbers as for many.
    half_bits = ((np.frexp(sizes - 1)[1] + 1) // 2).astype(np.uint64)  # frexp tells the bits of what is below 2^53
    ends = sizes.astype(np.uint64)
    round_keys = _hash(np.arange(_ROUNDS, dtype=np.uint64)[:, None], keys)
    while outside.size:
        walked = _feistel(images[outside], round_keys[:, outside], half_bits[outside])
        images[outside] = walked
        outside = outside[walked >= ends[outside]]
    return images


def _feistel(values: UInt64s, round_keys: UInt64s, half_bits: UInt64s) -> UInt64s:
    """Networks over 2 x half_bits bits, one a value; round_keys are (rounds, n), one column a value."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for keys in round_keys:
        mixed = _hash(right, keys)
        mixed &= mask
        mixed ^= left
        left, right = right, mixed
    return (left << half_bits) | right


def _hash(values: UInt64s, hash_key: np.uint64 | UInt64s) -> UInt64s:
    # Twice: neighbouring values under related keys leave traces in the low bits after one pass.
    once = splitmix64(values + hash_key)
    once ^= hash_key
    return splitmix64(once)
