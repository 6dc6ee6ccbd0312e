"""The order of samples as numbers in the concatenation of all shards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seer.data.mixture import MixedOrder
from seer.data.order import ShardOrder


def flat(order: ShardOrder | MixedOrder, batch_index: int, slots: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """The numbers that stand in some slots of a batch, or in all."""
    shard, sample = order.positions(batch_index, np.arange(order.global_batch_size) if slots is None else slots)
    assert (sample >= 0).all() and (sample < order.counts[shard]).all()
    return np.concatenate([[0], np.cumsum(order.counts)])[shard] + sample


def epoch_ids(order: ShardOrder, epoch: int) -> NDArray[np.int64]:
    """(batches, B) numbers of the samples of an epoch."""
    first = epoch * order.batches_per_epoch
    return np.stack([flat(order, first + batch) for batch in range(order.batches_per_epoch)])
