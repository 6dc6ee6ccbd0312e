"""Several sources in fixed shares: quotas, exact cover of each source, slices, scatter, golden ids."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_numbers import flat
from scipy import stats

from seer.data import order as data_order
from seer.data.mixture import MixedOrder, SourceShare
from seer.errors import UserError
from seer.source_list import quotas

SOURCES = [[40, 0, 30], [11], [200, 5, 17, 60]]
NAMES = ["web", "own", "art"]


def mixed(weights: tuple[float, ...] = (5, 1, 2), batch: int = 32, **options: Any) -> MixedOrder:
    return of(SOURCES, NAMES, weights, seed=3, global_batch_size=batch, **options)


def of(counts: list[Any], names: list[str], weights: tuple[float, ...], **options: Any) -> MixedOrder:
    sources = [SourceShare(*about, len(one)) for *about, one in zip(names, weights, counts, strict=True)]
    return MixedOrder(np.concatenate(counts), sources, **options)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 5000))
@settings(deadline=None)
def test_quotas_sum_up_and_are_off_by_less_than_one(weights: list[int], places: int) -> None:
    found = quotas(weights, places)
    assert sum(found) == places
    for weight, quota in zip(weights, found, strict=True):
        assert abs(quota - Fraction(weight * places, sum(weights))) < 1


def test_quotas_by_largest_remainder() -> None:
    assert quotas([0.7, 0.3], 10) == [7, 3]
    assert quotas([0.1, 0.2, 0.7], 10) == [1, 2, 7]
    assert quotas([1, 1, 1], 8) == [3, 3, 2]
    assert quotas([0.57, 0.29, 0.14], 10) == [6, 3, 1]
    assert quotas([70, 30], 4096) == [2867, 1229]


@pytest.mark.parametrize(("lanes", "window"), [(1, None), (2, 16), (4, None), (4, 24)])
def test_each_source_has_its_quota_in_every_batch_and_its_own_exact_epochs(lanes: int, window: int | None) -> None:
    order = mixed(lanes=lanes, window=window)
    assert order.quotas == [20, 4, 8]
    ends = np.cumsum([0, 70, 11, 282])
    ids = np.stack([flat(order, batch) for batch in range(36)])
    for number, quota in enumerate(order.quotas):
        inside = (ids >= ends[number]) & (ids < ends[number + 1])
        assert (inside.sum(1) == quota).all()
        samples = int(ends[number + 1] - ends[number])
        an_epoch = samples // lanes // (quota // lanes)
        for first in range(0, 36 - an_epoch + 1, an_epoch):  # its own epochs: 3, 2 and 35 batches
            rows = slice(first, first + an_epoch)
            epoch = ids[rows][inside[rows]]
            assert len(np.unique(epoch)) == len(epoch) > samples - quota - lanes


def test_ranks_of_any_number_take_slices_of_the_same_batch() -> None:
    for lanes, window in ((1, None), (4, 24)):
        whole = flat(mixed(lanes=lanes, window=window), 77)
        for world in (1, 2, 4, 8):
            order = mixed(lanes=lanes, window=window)
            assert np.concatenate([flat(order, 77, slots) for slots in np.arange(32).reshape(world, -1)]).tolist() == (
                whole.tolist()
            )


def test_a_source_stands_anywhere_in_a_lane() -> None:
    order = mixed(lanes=2)
    counts = np.zeros(32)
    for batch in range(2000):
        counts += order.positions(batch, np.arange(32))[0] == 3  # the only shard of `own`
    expected = 2000 * 4 / 32
    # A place is taken or not, and the places of a lane sum up: the variance of a draw without replacement.
    assert stats.chi2.sf(((counts - expected) ** 2).sum() / (expected * (1 - 4 / 32) * 16 / 15), 30) > 1e-4


def test_the_sequence_of_sources_changes_none_of_them() -> None:
    def own_in_turn(order: MixedOrder, shard: int, batches: int) -> list[int]:
        found = [order.positions(batch, np.arange(order.global_batch_size)) for batch in range(batches)]
        return sorted(int(one) for shards, samples in found for one in samples[shards == shard])

    turned = of([SOURCES[1], SOURCES[2]], ["own", "art"], (4, 28), seed=3, global_batch_size=32)
    assert own_in_turn(turned, 0, 1) == own_in_turn(mixed(), 3, 1)


def test_lanes_read_the_same_lane_of_every_source() -> None:
    counts = [np.full(400, 50), np.full(100, 50)]
    order = of(counts, ["a", "b"], (3, 1), seed=0, global_batch_size=512, lanes=32, window=500)
    read: set[tuple[int, int]] = set()
    for batch in range(20):
        shard, _ = order.positions(batch, np.arange(512))
        for node, shards in enumerate(shard.reshape(8, -1)):
            read |= {(node, one) for one in np.unique(shards).tolist()}
    assert len(read) <= 1.1 * len({shard for _, shard in read})


def test_a_thousand_million_samples_of_three_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.split(np.random.default_rng(0).integers(9000, 11_000, 100_000), [60_000, 90_000])
    order = of(counts, NAMES, (5, 3, 2), seed=0, global_batch_size=4096, lanes=64, window=40_000)
    slots, walks, taken = np.arange(640, 704), [], []  # of one of 64 ranks
    feistel = data_order._feistel
    monkeypatch.setattr(data_order, "_feistel", lambda *given: (walks.append(1), feistel(*given))[1])
    order.positions(0, slots)
    walks.clear()
    for batch in range(100, order.samples // 4096, order.samples // 409_600):
        began = time.process_time()
        order.positions(batch, slots)
        taken.append(time.process_time() - began)
    # What a call costs is its walks: 12, all sources together; one source after the other takes 20.
    assert len(walks) / len(taken) < 15
    assert np.median(taken) < 5e-3, "0.8 ms on two busy cores"


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(UserError, match=r"source own of data.mixture: its share of 32 places is none; give"):
        mixed((100, 1, 99))
    with pytest.raises(UserError, match=r"source own of data.mixture holds 11 images: a batch takes 16 of it"):
        mixed((1, 2, 1))
    with pytest.raises(UserError, match=r"data.lanes=5"):
        mixed(lanes=5)


def test_golden_ids() -> None:
    """Pinned when mixtures were first written: a change here breaks the resume of every run that uses them."""
    assert flat(mixed(lanes=4, window=24), 9)[:12].tolist() == GOLDEN_9


GOLDEN_9 = [175, 48, 46, 40, 176, 44, 43, 70, 60, 73, 57, 64]


def test_windows_of_a_mixture_name_the_shards_of_each_source() -> None:
    sources = [SourceShare("one", 3, 4), SourceShare("two", 1, 2)]
    order = MixedOrder([40, 30, 0, 50, 20, 20], sources, seed=1, global_batch_size=16, lanes=2, window=24)
    slots = np.arange(8, 16)
    known = set(range(6))
    for batch in range(40):
        used = set(order.positions(batch, slots)[0].tolist())
        now, later = (set(shards.tolist()) for shards in order.windows(batch, slots))
        assert used <= now and used <= known
        assert now & {0, 1, 3} and now & {4, 5} and 2 not in now | later
        known = now | later
