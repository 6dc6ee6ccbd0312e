"""Lanes and windows of the order: exact cover, slices, who reads which shard, uniformity, cost, golden ids."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sample_numbers import epoch_ids, flat
from scipy import stats

from seer.data.order import ShardOrder, permuted
from seer.errors import UserError
from seer.keyed_random import key

RAGGED = [700, 0, 1, 1800, 339, 0, 2, 911]


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    lanes=st.integers(1, 6),
    lane_slots=st.integers(1, 5),
    window=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
@settings(max_examples=80, deadline=None)
def test_an_epoch_takes_every_sample_at_most_once_and_leaves_less_than_a_batch_and_the_lanes(
    counts: list[int], lanes: int, lane_slots: int, window: int | None, seed: int, epoch: int
) -> None:
    batch = lanes * lane_slots
    if sum(counts) < batch:
        with pytest.raises(UserError, match=f"one batch needs {batch}"):
            ShardOrder(counts, seed=seed, global_batch_size=batch, lanes=lanes, window=window)
        return
    order = ShardOrder(counts, seed=seed, global_batch_size=batch, lanes=lanes, window=window)
    ids = epoch_ids(order, epoch)
    assert len(np.unique(ids)) == ids.size
    assert 0 <= sum(counts) - ids.size < batch + lanes


@pytest.mark.parametrize("window", [None, 1024, 1500, 100])
def test_exact_cover_of_ragged_shards_beyond_the_size_that_is_sorted(window: int | None) -> None:
    order = ShardOrder([*RAGGED, 4247], seed=3, global_batch_size=80, lanes=4, window=window)  # 8000 = 100 x 80
    for epoch in (0, 7):
        assert sorted(epoch_ids(order, epoch).ravel()) == list(range(8000))


@pytest.mark.parametrize("batch_index", [0, 77, 1000])
def test_ranks_of_any_number_take_slices_of_the_same_batch(batch_index: int) -> None:
    def order() -> ShardOrder:
        return ShardOrder(RAGGED, seed=1, global_batch_size=48, lanes=8, window=37)

    whole = flat(order(), batch_index)
    for world in (1, 2, 3, 4, 8):
        ranks = np.arange(48).reshape(world, -1)
        assert np.concatenate([flat(order(), batch_index, slots) for slots in ranks]).tolist() == whole.tolist()
    assert flat(order(), batch_index, np.array([40, 3, 41])).tolist() == whole[[40, 3, 41]].tolist()


def test_one_lane_whose_window_is_the_epoch_is_the_order_without_windows() -> None:
    plain = ShardOrder(RAGGED, seed=2, global_batch_size=64)
    window = ShardOrder(RAGGED, seed=2, global_batch_size=64, lanes=1, window=sum(RAGGED))
    assert all(flat(plain, batch).tolist() == flat(window, batch).tolist() for batch in (0, 5, 999))


@pytest.mark.parametrize(("window", "parts"), [(1250, 1), (500, 3), (1249, 2), (60, 21)])
def test_windows_of_a_lane_follow_each_other_and_are_of_one_size(window: int, parts: int) -> None:
    # One shard, so that numbers are places but for the turn: windows must be pieces of a circle, one after the other.
    order = ShardOrder([5000], seed=4, global_batch_size=100, lanes=4, window=window)
    ids = epoch_ids(order, 3).reshape(order.batches_per_epoch, 4, 25)
    turn = int(key(4, "offset", 3)) % 5000
    size = -(-1250 // parts)
    for lane in range(4):
        places = (ids[:, lane].ravel() - turn) % 5000 - 1250 * lane
        windows = [places[first : first + size] for first in range(0, 1250, size)]
        assert len(windows) == parts
        assert len({tuple(found % size) for found in windows}) == parts  # each in an order of its own
        for number, found in enumerate(windows):
            assert sorted(found) == list(range(number * size, min((number + 1) * size, 1250)))


def amplification(order: ShardOrder, nodes: int, batches: int) -> float:
    """Shards that nodes read in some batches, over those that there are."""
    read: set[tuple[int, int]] = set()
    for batch in range(batches):
        shard, _ = order.positions(batch, np.arange(order.global_batch_size))
        for node, shards in enumerate(shard.reshape(nodes, -1)):
            read |= {(node, one) for one in np.unique(shards).tolist()}
    return len(read) / len({shard for _, shard in read})


def test_nodes_read_shards_of_their_own() -> None:
    counts = np.random.default_rng(0).integers(900, 1100, 1000)
    lanes = ShardOrder(counts, seed=0, global_batch_size=2048, lanes=64, window=4000)
    assert amplification(lanes, nodes=8, batches=100) <= 1.1
    assert amplification(lanes, nodes=4, batches=lanes.batches_per_epoch) <= 1.1
    assert amplification(ShardOrder(counts, seed=0, global_batch_size=2048), nodes=8, batches=100) > 7


def test_a_batch_mixes_many_shards_and_a_lane_needs_few() -> None:
    order = ShardOrder(np.full(2000, 500), seed=0, global_batch_size=2048, lanes=64, window=2000)
    for batch in (0, 100, 399):
        shard, _ = order.positions(batch, np.arange(2048))
        counts = np.bincount(shard)
        assert (counts > 0).sum() > 64 * 3 and counts.max() < 32
        assert max(len(np.unique(lane)) for lane in shard.reshape(64, 32)) <= 2 * (2000 // 500 + 1)


def test_every_sample_drops_out_equally_rarely() -> None:
    # 103 samples in lanes of 25, of which 24 are used: by lanes and windows, 7 are left out each epoch.
    order = ShardOrder([50, 0, 53], seed=5, global_batch_size=24, lanes=4, window=7)
    assert order.batches_per_epoch == 4
    left_out = np.zeros(103)
    for epoch in range(1000):
        left_out += 1
        left_out[epoch_ids(order, epoch)] -= 1
    share = 7 / 103
    assert left_out.sum() == 1000 * 7
    assert stats.chi2.sf((left_out - 1000 * share).var() / (1000 * share * (1 - share)) * 103, 102) > 1e-4


def uniformity(order: ShardOrder, followed: NDArray[np.int64], epochs: int, bins: int) -> tuple[float, float]:
    """p values: whether single samples stand in every part of an epoch, and in every lane, equally often."""
    when = np.zeros((len(followed), bins))
    lane_of = np.zeros((len(followed), order.lanes))
    row = np.full(order.samples, -1)
    row[followed] = np.arange(len(followed))
    for epoch in range(epochs):
        rows = row[epoch_ids(order, epoch)]
        batch, slot = np.nonzero(rows >= 0)
        np.add.at(when, (rows[batch, slot], batch * bins // order.batches_per_epoch), 1)
        np.add.at(lane_of, (rows[batch, slot], slot * order.lanes // order.global_batch_size), 1)
    values = []
    for table in (when, lane_of):
        expected = table.sum(1, keepdims=True) / table.shape[1]
        values.append(stats.chi2.sf(((table - expected) ** 2 / expected).sum(), len(table) * (table.shape[1] - 1)))
    return values[0], values[1]


def test_samples_stand_anywhere_in_an_epoch() -> None:
    # Samples of different shards: those of one shard stay together in an epoch, which is what windows are for.
    order = ShardOrder([100] * 16, seed=9, global_batch_size=200, lanes=4, window=100)
    values = uniformity(order, np.arange(16) * 100 + 37, epochs=200, bins=4)
    assert all(1e-4 < value < 1 - 1e-4 for value in values), values


@pytest.mark.slow
def test_samples_stand_anywhere_in_an_epoch_of_large_windows() -> None:
    order = ShardOrder([1000] * 64, seed=9, global_batch_size=1600, lanes=8, window=2000)
    values = uniformity(order, np.arange(64) * 1000 + 501, epochs=600, bins=20)
    assert all(1e-4 < value < 1 - 1e-4 for value in values), values


def test_neighbours_in_a_lane_are_unrelated() -> None:
    order = ShardOrder([8000], seed=6, global_batch_size=80, lanes=4, window=2000)  # a lane is one window
    correlations = []
    for epoch in range(8):
        ids = epoch_ids(order, epoch).reshape(100, 4, 20)
        turn = int(key(6, "offset", epoch)) % 8000
        for lane in range(4):
            places = (ids[:, lane].ravel() - turn) % 8000 - 2000 * lane
            correlations.append(np.corrcoef(places[:-1], places[1:])[0, 1])
    assert max(map(abs, correlations)) < 4.5 / 2000**0.5 and abs(np.mean(correlations)) < 4.5 / 64000**0.5


def test_windows_are_permuted_independently() -> None:
    """The keys of windows lie a constant apart: nothing of that may be seen in what neighbouring windows do."""
    windows = np.arange(40_000, dtype=np.uint64)
    keys = key(7, "order", 0) + windows * np.uint64(0x9E3779B97F4A7C15)
    for place in (0, 1023):
        image = permuted(np.full(40_000, place, np.uint64), 1024, keys).astype(np.int64)
        assert stats.chisquare(np.bincount(image, minlength=1024)).pvalue > 1e-4
        pairs = np.bincount(image[:-1] // 64 * 16 + image[1:] // 64, minlength=256)
        assert stats.chisquare(pairs).pvalue > 1e-4


@pytest.mark.parametrize("size", [1, 5, 1023, 1024, 5000])
def test_permutations_of_many_keys_are_those_of_each(size: int) -> None:
    places = np.arange(3 * size, dtype=np.uint64) % np.uint64(size)
    keys = np.repeat(np.array([3, 2**63, 17], np.uint64), size)
    order = np.random.default_rng(0).permutation(3 * size)
    found = np.empty(3 * size, np.uint64)
    found[order] = permuted(places[order], size, keys[order])
    one_by_one = [permuted(np.arange(size, dtype=np.uint64), size, np.uint64(one)) for one in (3, 2**63, 17)]
    assert found.tolist() == np.concatenate(one_by_one).tolist()


def test_lanes_that_do_not_divide_a_batch() -> None:
    with pytest.raises(UserError, match=r"data.lanes=10 with train.global_batch_size=64.* divisor of 64, such as 2"):
        ShardOrder([1000], seed=0, global_batch_size=64, lanes=10)


def test_a_thousand_million_samples_in_a_hundred_thousand_shards() -> None:
    counts = np.random.default_rng(0).integers(9000, 11_000, 100_000)
    slots = np.arange(640, 704)  # of one of 64 ranks
    page = os.sysconf("SC_PAGE_SIZE")
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    began = time.process_time()
    order = ShardOrder(counts, seed=0, global_batch_size=4096, lanes=64, window=40_000)
    order.positions(0, slots)
    assert time.process_time() - began < 2
    assert (int(Path("/proc/self/statm").read_text().split()[1]) - resident) * page < 500e6
    taken = []
    for batch in range(100, order.batches_per_epoch, order.batches_per_epoch // 100):
        began = time.process_time()
        order.positions(batch, slots)
        taken.append(time.process_time() - began)
    assert np.median(taken) < 1e-3


def test_golden_ids() -> None:
    """Pinned when lanes were first written: a change here breaks the resume of every run that uses them."""
    small = ShardOrder([50, 0, 70], seed=0, global_batch_size=8, lanes=4, window=10)
    large = ShardOrder([10_000, 3, 20_000], seed=1, global_batch_size=256, lanes=4, window=2000)
    assert flat(small, 0).tolist() == GOLDEN_SMALL_0
    assert flat(small, 40).tolist() == GOLDEN_SMALL_40
    assert flat(large, 0, np.array([0, 1, 64, 65, 254, 255])).tolist() == GOLDEN_LARGE_0
    assert flat(large, 1000, np.array([0, 1, 64, 65, 254, 255])).tolist() == GOLDEN_LARGE_1000


GOLDEN_SMALL_0 = [65, 67, 90, 96, 8, 1, 34, 29]
GOLDEN_SMALL_40 = [92, 96, 2, 4, 34, 29, 59, 65]
GOLDEN_LARGE_0 = [7874, 7678, 15549, 15296, 29847, 29482]
GOLDEN_LARGE_1000 = [24904, 24922, 1088, 2024, 16987, 17141]


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    lanes=st.integers(1, 4),
    lane_slots=st.integers(1, 5),
    window=st.none() | st.integers(1, 60),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 60),
)
@settings(max_examples=150, deadline=None)
def test_windows_name_the_shards_of_each_batch_before_it_comes(
    counts: list[int], lanes: int, lane_slots: int, window: int | None, seed: int, start: int
) -> None:
    batch = lanes * lane_slots
    if sum(counts) < batch:
        return
    order = ShardOrder(counts, seed=seed, global_batch_size=batch, lanes=lanes, window=window)
    slots = np.arange(batch // 2, batch)  # of the upper lanes
    known: set[int] = set()
    for number in range(start, start + 20):
        used = set(order.positions(number, slots)[0].tolist())
        now, later = (set(shards.tolist()) for shards in order.windows(number, slots))
        assert used <= now
        # A window shorter than a batch is passed within one.
        assert number == start or used <= known or order._window < 2 * lane_slots
        assert all(counts[shard] for shard in now | later)
        known = now | later


def test_windows_name_no_more_than_they_need() -> None:
    order = ShardOrder([100] * 64, seed=3, global_batch_size=64, lanes=8, window=200)
    for batch in range(3 * order.batches_per_epoch):
        for rank in range(4):
            slots = np.arange(16 * rank, 16 * rank + 16)
            now, later = order.windows(batch, slots)
            # A window of two lanes is 2 x 200 samples, in at most 2 x 3 shards of 100.
            assert len(now) <= 6 * 2 and len(later) <= 6
            assert len(np.unique(now)) == len(now) and len(np.unique(later)) == len(later)
    whole = ShardOrder([100, 0, 50], seed=3, global_batch_size=10)
    assert [sorted(shards.tolist()) for shards in whole.windows(4, np.arange(5))] == [[0, 2], [0, 2]]
