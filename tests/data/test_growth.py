"""An order over shards that join later: batches before them stay, epochs after them take everything once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from seer.data.growth import Chapter, GrowingOrder, Growth
from seer.data.mixture import MixedOrder, SourceShare
from seer.data.order import ShardOrder
from seer.errors import UserError


def ids(order: Any, batch_index: int, slots: NDArray[np.int64] | None = None) -> list[tuple[int, int]]:
    shard, sample = order.positions(batch_index, np.arange(order.global_batch_size) if slots is None else slots)
    assert (sample >= 0).all() and (sample < order.counts[shard]).all()
    return list(zip(shard.tolist(), sample.tolist(), strict=True))


@st.composite
def growing(draw: st.DrawFn) -> tuple[GrowingOrder, Growth, dict[str, Any]]:
    """Up to three arrivals, each at the next epoch after some batch, anywhere in the list."""
    lanes = draw(st.sampled_from([1, 2]))
    options = {
        "seed": draw(st.integers(0, 2**32)),
        "global_batch_size": lanes * draw(st.integers(1, 4)),
        "lanes": lanes,
        "window": draw(st.sampled_from([None, 3])),
    }
    counts = draw(st.lists(st.integers(0, 20), min_size=4, max_size=8))
    joined = np.array(draw(st.lists(st.integers(0, 2), min_size=len(counts), max_size=len(counts))), np.int64)
    counts[0], joined[0] = 20, 0  # enough for a batch
    chapters = [Chapter(0, 0)]
    for _ in range(2):
        begun = chapters[-1].first_batch + 1
        after = draw(st.integers(begun, begun + 15))
        # What has not joined yet must not shorten the epochs of those that have.
        kept = np.where(joined < len(chapters), counts, 0)
        before = GrowingOrder(kept, Growth(chapters, np.minimum(joined, len(chapters) - 1)), **options)
        chapters.append(before.next_epoch(after))
    growth = Growth(chapters, joined)
    return GrowingOrder(counts, growth, **options), growth, options


@given(growing())
@settings(max_examples=60, deadline=None)
def test_an_epoch_takes_each_sample_of_its_chapter_once(made: tuple[GrowingOrder, Growth, dict[str, Any]]) -> None:
    order, growth, options = made
    for number, chapter in enumerate(growth.chapters):
        there = np.flatnonzero(growth.joined <= number)
        samples = int(order.counts[there].sum())
        an_epoch = samples // options["lanes"] // (options["global_batch_size"] // options["lanes"])
        ends = [other.first_batch for other in growth.chapters[number + 1 :]] or [chapter.first_batch + 2 * an_epoch]
        epochs, rest = divmod(ends[0] - chapter.first_batch, an_epoch)
        assert epochs and not rest, "chapters are whole epochs"
        assert order.epochs(chapter.first_batch) == chapter.first_epoch
        assert order.epochs(chapter.first_batch + an_epoch // 2) == chapter.first_epoch + an_epoch // 2 / an_epoch
        for epoch in range(epochs):
            first = chapter.first_batch + epoch * an_epoch
            found = [one for batch in range(first, first + an_epoch) for one in ids(order, batch)]
            assert len(set(found)) == len(found) > samples - options["global_batch_size"] - options["lanes"]
            assert {shard for shard, _ in found} <= set(there.tolist())


@given(growing())
@settings(max_examples=40, deadline=None)
def test_a_chapter_is_the_order_of_its_shards_with_the_epochs_counted_on(
    made: tuple[GrowingOrder, Growth, dict[str, Any]],
) -> None:
    order, growth, options = made
    for number, chapter in enumerate(growth.chapters):
        there = np.flatnonzero(growth.joined <= number)
        alone = ShardOrder(order.counts[there], **options)
        for batch in range(alone.batches_per_epoch):
            expected = ids(alone, chapter.first_epoch * alone.batches_per_epoch + batch)
            found = ids(order, chapter.first_batch + batch)
            assert found == [(int(there[shard]), one) for shard, one in expected]
            now, later = order.windows(chapter.first_batch + batch, np.arange(options["global_batch_size"]))
            assert {shard for shard, _ in found} <= set(now.tolist()) and set(later.tolist()) <= set(there.tolist())


@given(growing(), st.sampled_from([1, 2, 3]))
@settings(max_examples=30, deadline=None)
def test_ranks_take_slices_of_the_same_batches(made: tuple[GrowingOrder, Growth, dict[str, Any]], world: int) -> None:
    order, growth, _ = made
    for batch in range(growth.chapters[-1].first_batch + 3):
        parts = np.array_split(np.arange(order.global_batch_size), world)
        assert [one for part in parts for one in ids(order, batch, part)] == ids(order, batch)


def test_others_are_those_of_the_chapter() -> None:
    joined = np.array([1, 0, 0, 1, 0, 0], np.int64)
    order = GrowingOrder(
        [5, 5, 0, 5, 5, 5], Growth([Chapter(0, 0), Chapter(9, 3)], joined), seed=0, global_batch_size=5
    )
    assert list(order.others(8, 4)) == [5, 1]
    assert list(order.others(9, 4)) == [5, 0, 1, 3]
    assert list(order.others(8, 4)) == [5, 1]


def test_too_few_images_at_the_beginning_are_refused_whatever_comes_later() -> None:
    growth = Growth([Chapter(0, 0), Chapter(1, 1)], np.array([0, 1], np.int64))
    with pytest.raises(UserError, match="3 samples in 1 shard: one batch needs 5"):
        GrowingOrder([3, 100], growth, seed=0, global_batch_size=5)


def mixed() -> MixedOrder:
    """40 and 20 images, half and half in batches of 8; the first source gets 20 more in its second epoch."""
    growths = [
        Growth([Chapter(0, 0), Chapter(10, 1)], np.array([0, 1, 0], np.int64)),
        Growth([Chapter(0, 0)], np.array([0], np.int64)),
    ]
    sources = [SourceShare("web", 1, 3), SourceShare("own", 1, 1)]
    return MixedOrder([20, 20, 20, 20], sources, growths, seed=1, global_batch_size=8)


def test_a_source_grows_in_its_own_epochs() -> None:
    order = mixed()
    plain = MixedOrder([20, 20, 20], [SourceShare("web", 1, 2), SourceShare("own", 1, 1)], seed=1, global_batch_size=8)
    now = [0, 2, 3]  # where the former shards stand in the list as it is now
    for batch in range(10):
        assert ids(order, batch) == [(now[shard], sample) for shard, sample in ids(plain, batch)]
    found = [one for batch in range(10, 25) for one in ids(order, batch)]
    of_web = [one for one in found if one[0] < 3]
    assert len(set(of_web)) == len(of_web) == 60
    assert sum(shard == 3 for shard, _ in found) == 15 * 4
    assert list(order.others(9, 0)) == [2] and list(order.others(10, 0)) == [1, 2] and list(order.others(9, 3)) == []


def test_passes_over_a_mixture_count_what_it_held_at_the_time() -> None:
    order = mixed()
    assert [order.epochs(batch) for batch in (0, 7, 10)] == [0.0, 1.0, 10 / 7]  # 60 images
    assert order.epochs(30) == pytest.approx(10 / 7 + 2)  # 80
