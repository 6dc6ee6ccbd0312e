"""A run of several lives, each with more shards: no batch that a later life keeps is another than the last one says."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer.data.growth import Chapter
from seer.data.history import History
from seer.data.mixture import SourceShare, order_of
from seer.errors import UserError
from seer.shard_list import ListedShard, ShardList

BATCH = 8


def shard(name: str, samples: int = 20, digest: int = 1) -> ListedShard:
    return ListedShard(f"/somewhere/{name}.tar", samples, 10_240, f"{digest:032x}")


def listed(shards: Sequence[ListedShard]) -> ShardList:
    return ShardList(sorted(shards, key=lambda one: (one.name, one.digest)))


class Lives:
    """A run that is killed and goes on: each life makes batches, and the next one goes on from one of them."""

    def __init__(self, names: Sequence[str], options: dict[str, Any]) -> None:
        self.sources = [SourceShare(name, 1 + number, 0) for number, name in enumerate(names)]
        self.held: list[list[ListedShard]] = [[] for _ in names or [""]]
        self.made: list[list[tuple[str, int]]] = []
        self.history: History | None = None
        self.options = options

    def live(self, joining: Sequence[Sequence[ListedShard]], went_back: int, batches: int) -> None:
        for held, new in zip(self.held, joining, strict=True):
            held += new
        del self.made[max(0, len(self.made) - went_back) :]
        shards, sources = self.now()
        if self.history is None:
            self.history = History.beginning(shards, sources)
        else:
            saved = json.loads(json.dumps(self.history.to_json()))
            self.history = History.from_json(saved, "shards.json").continued(
                shards,
                sources,
                len(self.made),
                global_batch_size=BATCH,
                lanes=self.options["lanes"],
                allow_growth=True,
            )
        self.made += self.told(range(len(self.made), len(self.made) + batches))

    def now(self) -> tuple[ShardList, list[SourceShare]]:
        lists = [listed(held) for held in self.held]
        sources = [source._replace(shards=len(one)) for source, one in zip(self.sources, lists, strict=False)]
        return ShardList.joined(lists), sources

    def told(self, batches: range) -> list[list[tuple[str, int]]]:
        """The batches that the history as it is now means, by the names of shards."""
        shards, sources = self.now()
        assert self.history is not None
        growths = self.history.growths(shards, sources)
        order = order_of(shards.counts, sources, growths, seed=5, global_batch_size=BATCH, **self.options)
        found = []
        for batch in batches:
            numbers, samples = order.positions(batch, np.arange(BATCH))
            names = [shards.listed[number].location for number in numbers.tolist()]
            found.append(list(zip(names, samples.tolist(), strict=True)))
        return found


@st.composite
def lives(draw: st.DrawFn) -> Lives:
    names = draw(st.sampled_from([(), ("web", "own")]))
    run = Lives(names, {"lanes": draw(st.sampled_from([1, 2])), "window": draw(st.sampled_from([None, 5]))})
    number = 0
    for life in range(draw(st.integers(2, 5))):
        joining: list[list[ListedShard]] = []
        for source in names or [""]:
            joining.append([])
            for _ in range(draw(st.integers(0, 2)) if life else 1):
                number += 1
                place = draw(st.integers(0, 9))  # anywhere among those that are there
                samples = draw(st.integers(0, 20)) if life else 30
                joining[-1].append(shard(f"{place}-{number}-{source}", samples, digest=number))
        run.live(joining, went_back=draw(st.integers(0, 12)), batches=draw(st.integers(0, 12)))
    return run


@given(lives())
@settings(max_examples=80, deadline=None)
def test_the_batches_of_all_lives_are_those_of_a_run_that_knew(run: Lives) -> None:
    assert run.told(range(len(run.made))) == run.made


@given(lives())
@settings(max_examples=30, deadline=None)
def test_everything_that_is_there_is_learned_from_in_the_end(run: Lives) -> None:
    names = {shard for batch in run.told(range(len(run.made), len(run.made) + 80)) for shard, _ in batch}
    counts = {one.location: one.samples for held in run.held for one in held}
    # What is left over of an epoch may be a whole small shard; over several epochs it comes.
    assert names == {name for name, count in counts.items() if count}


def chapters(history: History) -> list[tuple[int, int, list[str]]]:
    (source,) = history.to_json()["sources"]
    return [
        (chapter["first_batch"], chapter["first_epoch"], [one.name for one in chapter["shards"]])
        for chapter in source["chapters"]
    ]


def go_on(history: History, names: str, batch_index: int, *, allow_growth: bool = True) -> History:
    return history.continued(
        listed([shard(name) for name in names.split()]),
        [],
        batch_index,
        global_batch_size=BATCH,
        lanes=1,
        allow_growth=allow_growth,
    )


START = History.beginning(listed([shard("b"), shard("d")]), [])  # 40 images: epochs of 5 batches


@pytest.mark.parametrize(("batch", "first", "epoch"), [(0, 0, 0), (1, 5, 1), (5, 5, 1), (6, 10, 2), (23, 25, 5)])
def test_new_shards_join_at_the_first_epoch_that_is_still_to_begin(batch: int, first: int, epoch: int) -> None:
    assert chapters(go_on(START, "a b c d", batch)) == [(0, 0, ["b.tar", "d.tar"]), (first, epoch, ["a.tar", "c.tar"])]


def test_later_epochs_are_counted_in_the_length_that_they_have() -> None:
    twice = go_on(go_on(START, "a b d", 7), "a b c d", 11)  # from batch 10 on epochs have 7 batches
    assert chapters(twice)[1:] == [(10, 2, ["a.tar"]), (17, 3, ["c.tar"])]
    assert go_on(twice, "a b c d", 300).to_json() == twice.to_json()


def test_a_chapter_that_has_not_begun_is_replaced_by_what_is_there_now() -> None:
    pending = go_on(START, "a b d", 7)
    for batch in (7, 10):  # the batch of the boundary itself is still to be made
        assert chapters(go_on(pending, "a b c d", batch))[1:] == [(10, 2, ["a.tar", "c.tar"])]
        assert chapters(go_on(pending, "b c d", batch))[1:] == [(10, 2, ["c.tar"])]
        assert chapters(go_on(pending, "b d", batch))[1:] == []
    with pytest.raises(UserError, match=r"data.shards lacks a.tar, which the run knows"):
        go_on(pending, "b d", 11)
    assert chapters(go_on(pending, "a b d", 3)) == chapters(pending), "it went back, with the same shards"
    assert chapters(go_on(pending, "a b c d", 3))[1:] == [(5, 1, ["a.tar", "c.tar"])]


def test_without_growth_the_shards_must_be_the_same() -> None:
    grown = go_on(START, "a b d", 7)
    assert go_on(grown, "a b d", 20, allow_growth=False).to_json() == grown.to_json()
    with pytest.raises(
        UserError, match=r"data.shards names a.tar and 1 more \(40 images\), which the run does not .*allow_growth=true"
    ):
        go_on(START, "a b c d", 7, allow_growth=False)
    with pytest.raises(UserError, match=r"data.shards lacks a.tar, which the run knows"):
        go_on(grown, "b d", 7, allow_growth=False)


@pytest.mark.parametrize("allow_growth", [True, False])
def test_what_is_missing_or_changed_is_named(allow_growth: bool) -> None:
    with pytest.raises(UserError, match=r"lacks b.tar and 1 more, which the run knows: .*; bring them back"):
        go_on(START, "a c", 7, allow_growth=allow_growth)
    with pytest.raises(UserError, match=r"d.tar changed \(20 images of digest 0+2, the run knows 20 of 0+1\): "):
        START.continued(
            listed([shard("b"), shard("d", digest=2), shard("e")]),
            [],
            0,
            global_batch_size=BATCH,
            lanes=1,
            allow_growth=allow_growth,
        )


def test_a_copy_of_a_shard_may_join() -> None:
    doubled = go_on(START, "b b d", 7)
    (growth,) = doubled.growths(listed([shard("b"), shard("b"), shard("d")]), [])
    assert growth.chapters == [Chapter(0, 0), Chapter(10, 2)] and growth.joined.tolist() == [0, 1, 0]
    with pytest.raises(UserError, match=r"lacks b\.tar"):
        go_on(doubled, "b d", 20)


def test_what_joins_is_said() -> None:
    held, new = [shard("b"), shard("d")], [shard("e", samples=1)]
    one = START.continued(listed([*held, *new]), [], 7, global_batch_size=BATCH, lanes=1, allow_growth=True)
    assert one.to_come(7, 1000) == ["1 new shard (1 image) joins at epoch 2 (step 10)"]
    grown = go_on(START, "a b c d", 7)
    assert grown.to_come(7, 1000) == ["2 new shards (40 images) join at epoch 2 (step 10)"]
    assert grown.to_come(10, 1000) == grown.to_come(7, 1000)
    assert grown.to_come(11, 1000) == []
    assert grown.to_come(7, 10) == [
        "2 new shards (40 images) join at epoch 2 (step 10, after the last step of this run)"
    ]


def test_each_source_has_its_own_history() -> None:
    sources = [SourceShare("web", 3, 1), SourceShare("own", 1, 1)]
    start = History.beginning(ShardList([shard("w", 24), shard("o", 10)]), sources)  # 4 and 5 batches
    more = ShardList([shard("v"), shard("w", 24), shard("n"), shard("o", 10)])
    now = [source._replace(shards=2) for source in sources]
    grown = start.continued(more, now, 6, global_batch_size=BATCH, lanes=1, allow_growth=True)
    assert grown.to_come(6, 1000) == [
        "1 new shard (20 images) of web joins at its epoch 2 (step 8)",
        "1 new shard (20 images) of own joins at its epoch 2 (step 10)",
    ]
    with pytest.raises(UserError, match=r"source own of data\.mixture names n\.tar"):
        start.continued(
            ShardList([shard("w", 24), shard("n"), shard("o", 10)]),
            [sources[0], now[1]],
            6,
            global_batch_size=BATCH,
            lanes=1,
            allow_growth=False,
        )


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {"format": "seer-run-shards-2", "sources": []}, {"format": "seer-run-shards-1", "sources": [{}]}],
)
def test_a_file_that_is_something_else_is_refused(content: object) -> None:
    with pytest.raises(UserError, match=r"RUN/shards\.json is not a run's list of shards"):
        History.from_json(content, "RUN/shards.json")


def test_a_hundred_thousand_shards() -> None:
    shards = ShardList([shard(f"{number:06d}") for number in range(100_000)])
    history = History.beginning(ShardList(shards.listed[::2]), [])
    began = time.process_time()
    grown = history.continued(shards, [], 7, global_batch_size=BATCH, lanes=1, allow_growth=True)
    file = json.dumps(grown.to_json())
    (growth,) = History.from_json(json.loads(file), "shards.json").growths(shards, [])
    assert time.process_time() - began < 20  # about one; anything quadratic takes hours
    assert growth.joined.tolist() == [0, 1] * 50_000
    assert len(file) < 100 * 100_000
