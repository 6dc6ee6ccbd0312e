"""Which sample stands at which place of which batch: pure arithmetic, numpy only, no state that must be saved.

An epoch is a keyed permutation of all samples, cut into whole batches. Any batch of any epoch is found directly, in
memory proportional to the number of shards: a run resumes anywhere, and ranks and workers need not talk to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seer.errors import UserError
from seer.keyed_random import key, splitmix64

_ROUNDS = 4
# A Feistel network over few elements is a poor permutation; so few are cheap to sort.
_SORT_BELOW = 1024

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]


class ShardOrder:
    """The order of samples: batch b, slot i -> (shard, sample in the shard), a pure function of the arguments.

    Within an epoch no sample comes twice; fewer than ``global_batch_size`` samples (the remainder) do not come at all,
    other ones in each epoch.

    Args:
        counts: (S,) samples of each shard; zeros are allowed.
        seed: the run's seed.
        global_batch_size: images of a batch, over all ranks.

    Raises:
        UserError: there are fewer samples than one batch needs.
    """

    def __init__(self, counts: Sequence[int] | Int64s, *, seed: int, global_batch_size: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples = int(self.counts.sum())
        self.seed, self.global_batch_size = seed, global_batch_size
        self.batches_per_epoch = self.samples // global_batch_size
        if self.batches_per_epoch == 0:
            raise UserError(
                f"{self.samples} samples in {len(self.counts)} shard{'s' * (len(self.counts) != 1)}",
                f"one batch needs {global_batch_size} (train.global_batch_size)",
                "name more shards or take a smaller batch",
            )
        self._cached_epoch = -1
        self._shard_at: Int64s = np.empty(0, np.int64)
        self._ends: Int64s = np.empty(0, np.int64)

    def epoch(self, batch_index: int) -> int:
        """The pass over the data that a batch belongs to, from 0."""
        return batch_index // self.batches_per_epoch

    def positions(self, batch_index: int, slots: Int64s) -> tuple[Int64s, Int64s]:
        """Where the images of some slots of a global batch lie.

        Args:
            batch_index: the global batch, from 0, counted over epochs.
            slots: (n,) int64 places in the batch, in [0, global_batch_size).

        Returns:
            shard (n,) int64, and sample in that shard (n,) int64.
        """
        epoch, batch = divmod(batch_index, self.batches_per_epoch)
        self._enter(epoch)
        places = (batch * self.global_batch_size + np.asarray(slots)).astype(np.uint64)
        mixed = permuted(places, self.samples, key(self.seed, "order", epoch)).astype(np.int64)
        # The batches cover the first places only: turned by another offset each epoch, the remainder changes.
        mixed = (mixed + int(key(self.seed, "offset", epoch)) % self.samples) % self.samples
        at = np.searchsorted(self._ends, mixed, side="right")
        shard = self._shard_at[at]
        return shard, mixed - (self._ends[at] - self.counts[shard])

    def _enter(self, epoch: int) -> None:
        """The shards in the order of the epoch, and where each ends in their concatenation."""
        if epoch != self._cached_epoch:
            self._shard_at = sorted_permutation(len(self.counts), key(self.seed, "shards", epoch))
            self._ends = np.cumsum(self.counts[self._shard_at])
            self._cached_epoch = epoch


def sorted_permutation(size: int, permutation_key: np.uint64) -> Int64s:
    """A keyed permutation of range(size), by sorting hashes: for what is small enough to be held."""
    return np.argsort(_hash(np.arange(size, dtype=np.uint64), permutation_key), kind="stable")


def permuted(places: UInt64s, size: int, permutation_key: np.uint64) -> UInt64s:
    """The images of some places under a keyed permutation of range(size), without holding the permutation.

    A Feistel network permutes the next even power of two; what falls outside is sent through again until it falls
    inside (cycle walking: fewer than four times on average). Below 1,024 elements the permutation is sorted instead.

    Args:
        places: (n,) uint64, each below size.
    """
    if size < _SORT_BELOW:
        return sorted_permutation(size, permutation_key)[places.astype(np.int64)].astype(np.uint64)
    half_bits = ((size - 1).bit_length() + 1) // 2
    keys = _hash(np.arange(_ROUNDS, dtype=np.uint64), permutation_key)
    places = _feistel(places, keys, half_bits)
    outside = np.flatnonzero(places >= size)
    while outside.size:
        places[outside] = _feistel(places[outside], keys, half_bits)
        outside = outside[places[outside] >= size]
    return places


def _feistel(values: UInt64s, keys: UInt64s, half_bits: int) -> UInt64s:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in keys:
        left, right = right, left ^ (_hash(right, round_key) & mask)
    return (left << shift) | right


def _hash(values: UInt64s, hash_key: np.uint64) -> UInt64s:
    # Twice: neighbouring values under related keys leave traces in the low bits after one pass.
    return splitmix64(splitmix64(values + hash_key) ^ hash_key)
