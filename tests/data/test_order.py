"""The order of samples: exact cover, slices, uniformity, golden ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_numbers import epoch_ids, flat
from scipy import stats

from seer.data.order import ShardOrder, permuted, sorted_permutation
from seer.errors import UserError


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(1, 16),
    st.integers(0, 2**40),
    st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_every_sample_at_most_once_and_leaves_less_than_a_batch(
    counts: list[int], batch: int, seed: int, epoch: int
) -> None:
    if sum(counts) < batch:
        with pytest.raises(UserError, match=f"one batch needs {batch}"):
            ShardOrder(counts, seed=seed, global_batch_size=batch)
        return
    order = ShardOrder(counts, seed=seed, global_batch_size=batch)
    ids = epoch_ids(order, epoch).ravel()
    assert len(np.unique(ids)) == len(ids)
    assert 0 <= sum(counts) - len(ids) < batch


def test_exact_cover_beyond_the_size_that_is_sorted() -> None:
    counts = [0, 700, 1, 0, 1800, 339, 0]
    order = ShardOrder(counts, seed=3, global_batch_size=71)  # 2840 = 40 x 71
    assert sorted(epoch_ids(order, 2).ravel()) == list(range(2840))


@pytest.mark.parametrize("size", [1, 2, 5, 1023, 1024, 1025, 4096, 5000])
def test_permutations_are_bijections(size: int) -> None:
    key = np.uint64(12345)
    assert sorted(permuted(np.arange(size, dtype=np.uint64), size, key)) == list(range(size))
    assert sorted(sorted_permutation(size, key)) == list(range(size))


def test_slots_of_ranks_are_slices_of_the_global_batch() -> None:
    order = ShardOrder([500, 900, 3], seed=1, global_batch_size=24)
    whole = flat(order, 77, np.arange(24))
    for world in (2, 3, 8):
        parts = [
            flat(
                ShardOrder([500, 900, 3], seed=1, global_batch_size=24),
                77,
                np.arange(r * 24 // world, (r + 1) * 24 // world),
            )
            for r in range(world)
        ]
        assert np.concatenate(parts).tolist() == whole.tolist()
    assert flat(order, 77, np.array([20, 3])).tolist() == whole[[20, 3]].tolist()


def test_epochs_seeds_and_batch_sizes_give_other_orders() -> None:
    one = ShardOrder([3000], seed=0, global_batch_size=100)
    assert epoch_ids(one, 0).tolist() != epoch_ids(one, 1).tolist()
    assert epoch_ids(one, 0).tolist() != epoch_ids(ShardOrder([3000], seed=1, global_batch_size=100), 0).tolist()


def test_every_sample_drops_out_equally_rarely() -> None:
    # One shard of 100 and batches of 64: 36 are left out each epoch; without a turn it could be the same ones.
    order = ShardOrder([100], seed=5, global_batch_size=64)
    left_out = np.zeros(100)
    for epoch in range(500):
        left_out += 1
        left_out[epoch_ids(order, epoch)] -= 1
    assert left_out.sum() == 500 * 36
    # Within an epoch the counts are negatively correlated: the variance is that of a Bernoulli variable, not Poisson's.
    assert stats.chi2.sf((left_out - 180).var() / (500 * 0.36 * 0.64) * 100, 99) > 1e-4


def test_shards_are_spread_evenly_over_an_epoch() -> None:
    order = ShardOrder([1000] * 8, seed=9, global_batch_size=80)
    p_values = []
    for epoch in range(6):
        ids = epoch_ids(order, epoch).ravel()
        table = np.zeros((8, 20))
        np.add.at(table, (ids // 1000, np.arange(8000) * 20 // 8000), 1)
        p_values.append(stats.chi2.sf(((table - 50) ** 2 / 50).sum(), 7 * 19))
        assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.05
    assert min(p_values) > 1e-4 and max(p_values) < 1 - 1e-4


def test_a_batch_of_a_thousand_million_samples_is_found_without_holding_them() -> None:
    order = ShardOrder(np.full(1000, 1_000_000), seed=0, global_batch_size=4096)
    ids = flat(order, 10**6, np.arange(4096))
    assert len(np.unique(ids)) == 4096 and ids.max() > 9 * 10**8 and ids.min() < 10**8


def test_golden_ids() -> None:
    """Pinned when the order was first written: a change here breaks the resume of every run that exists."""
    small = ShardOrder([5, 0, 7], seed=0, global_batch_size=4)
    large = ShardOrder([10_000, 3, 20_000], seed=1, global_batch_size=256)
    assert flat(small, 0, np.arange(4)).tolist() == GOLDEN_SMALL_0
    assert flat(small, 7, np.arange(4)).tolist() == GOLDEN_SMALL_7
    assert flat(large, 0, np.arange(6)).tolist() == GOLDEN_LARGE_0
    assert flat(large, 1000, np.arange(250, 256)).tolist() == GOLDEN_LARGE_1000


GOLDEN_SMALL_0 = [5, 7, 1, 6]
GOLDEN_SMALL_7 = [3, 4, 7, 6]
GOLDEN_LARGE_0 = [17248, 20624, 18763, 10913, 11137, 27098]
GOLDEN_LARGE_1000 = [20464, 1157, 26751, 22608, 20221, 21242]
