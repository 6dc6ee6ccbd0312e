"""Killed runs consume what an uninterrupted one does, slot by slot and byte by byte, on any number of ranks."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from ledger import LifeLedger, NumberedShards, Nursery, Sample, kill_life, read_life, wait_for_steps
from tiny_run import NARROW, tiny_words

BATCH = 12  # for 1, 2, 3 and 4 ranks
EVERY = 3  # steps between checkpoints


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@dataclass
class Source:
    """Shards, and how many slots of a batch they fill."""

    shards: NumberedShards
    slots: int


@dataclass
class Variant:
    """A way to read the shards: what is said to `seer train`, and what it means."""

    words: tuple[str, ...]
    sources: list[Source]
    lanes: int


@pytest.fixture(scope="module")
def lanes_and_windows(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """64 images in six tars, one of them empty and one of a single image that is damaged."""
    folder = tmp_path_factory.mktemp("lanes")
    damaged = {(0, 1), (0, 9), (0, 16), (2, 5), (2, 6), (2, 14), (3, 3), (4, 0), (5, 2), (5, 13)}
    shards = NumberedShards.make(folder / "shards", "web", (17, 0, 23, 9, 1, 14), damaged)
    return Variant((f"data.shards={shards.pattern}", "data.lanes=4", "data.window_images=10"), [Source(shards, 12)], 4)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """Two images of one source for one of the other, each in lanes, windows and epochs of its own."""
    folder = tmp_path_factory.mktemp("mixture")
    web = NumberedShards.make(folder / "web", "web", (21, 0, 18, 2), {(0, 3), (2, 17)})
    own = NumberedShards.make(folder / "own", "own", (9, 6), {(1, 5)})
    words = (f"data.mixture=[web 2 {web.pattern},own 1 {own.pattern}]", "data.shards=[]")
    return Variant((*words, "data.lanes=2", "data.window_images=12"), [Source(web, 8), Source(own, 4)], 2)


def words_of(variant: Variant, run: Path, steps: int, workers: int) -> list[str]:
    more = (f"train.steps={steps}", f"train.global_batch_size={BATCH}", f"checkpoint.every_steps={EVERY}")
    return tiny_words(run, "", *variant.words, *NARROW, *more, f"data.workers={workers}", "data.max_bad_share=1")


def newest_checkpoint(run: Path) -> int:
    names = [re.fullmatch(r"step-(\d{8})", path.name) for path in (run / "checkpoints").glob("step-*")]
    return max((int(name[1]) for name in names if name), default=0)


def whole(nursery: Nursery, folder: Path, variant: Variant, steps: int) -> LifeLedger:
    """The ledger of one process without a worker that nobody disturbs."""
    nursery.start(words_of(variant, folder / "whole", steps, 0), folder / "whole-life", 1)
    assert nursery.end() == [0], (folder / "whole-life.log").read_text()[-3000:]
    return read_life(folder / "whole-life", 1)


def killed(
    nursery: Nursery, folder: Path, variant: Variant, steps: int, lives: Sequence[tuple[int, int]], dice: random.Random
) -> tuple[list[LifeLedger], list[int]]:
    """A run whose lives of (ranks, workers) are all killed but the last; what they consumed, and where they began."""
    run, ledgers, starts = folder / "run", [], []
    for number, (ranks, workers) in enumerate(lives):
        prefix, start = folder / f"life-{number}", newest_checkpoint(run)
        pids = nursery.start(words_of(variant, run, steps, workers), prefix, ranks)
        last = number == len(lives) - 1
        if not last:
            # So that the last life has something left to do, whatever the dice say.
            room = (steps - 2 - start) // (len(lives) - number)
            wait_for_steps(prefix, ranks, dice.randint(1, max(1, room)), pids)
            time.sleep(dice.uniform(0, 0.03))
            kill_life(pids)
        codes = nursery.end()
        assert codes == [0 if last else -9] * ranks, prefix.with_suffix(".log").read_text()[-3000:]
        ledgers.append(read_life(prefix, ranks))
        starts.append(start)
    return ledgers, starts


def assert_same_batches(expected: LifeLedger, lives: list[LifeLedger], starts: list[int], steps: int) -> None:
    """Whatever any rank of any life consumed is what the undisturbed process consumed in that slot of that step."""
    assert expected.rows.keys() == {(step, slot) for step in range(steps) for slot in range(BATCH)}
    for number, (life, start) in enumerate(zip(lives, starts, strict=True)):
        for taken in life.steps:
            assert taken == list(range(start, start + len(taken))), (number, start, taken)
        for place, row in life.rows.items():
            assert row == expected.rows[place], (number, place)
        # Steps that a later life builds upon were taken whole: by all ranks.
        end = starts[number + 1] if number + 1 < len(lives) else steps
        trained = {place for place in life.rows if place[0] < end}
        assert trained == {(step, slot) for step in range(start, end) for slot in range(BATCH)}, number


def assert_exact_epochs(ledger: LifeLedger, variant: Variant, steps: int) -> None:
    """Over each source's own epochs each sample occurs once, but for the tail; it is seen, or what stands in for it."""
    for source in variant.sources:
        tars, total = source.shards.counts, sum(source.shards.counts.values())
        rows = {place: row for place, row in sorted(ledger.rows.items()) if row.sample[0] in tars}
        for place, row in rows.items():
            assert row.number == source.shards.numbers[source.shards.stands_in(row.sample)], place
        batches = total // variant.lanes // (source.slots // variant.lanes)
        assert steps >= 2 * batches
        for epoch in range(steps // batches):
            occurring: list[Sample] = [row.sample for row in rows.values() if row.batch // batches == epoch]
            assert len(occurring) == batches * source.slots > total - source.slots - variant.lanes
            assert len(set(occurring)) == len(occurring), epoch
        met = {row.sample for row in rows.values()}
        assert source.shards.damaged <= met, "else damage proves nothing"


def assert_proven(
    nursery: Nursery, folder: Path, variant: Variant, steps: int, runs: Sequence[Sequence[tuple[int, int]]]
) -> None:
    expected = whole(nursery, folder, variant, steps)
    assert_exact_epochs(expected, variant, steps)
    for number, lives in enumerate(runs):
        (folder / f"run-{number}").mkdir()
        found, starts = killed(nursery, folder / f"run-{number}", variant, steps, lives, random.Random(number))
        assert_same_batches(expected, found, starts, steps)


def test_a_killed_run_consumes_what_an_uninterrupted_one_does(
    tmp_path: Path, nursery: Nursery, lanes_and_windows: Variant
) -> None:
    assert_proven(nursery, tmp_path, lanes_and_windows, 12, [[(1, 2), (4, 1), (3, 0), (2, 3)]])


def test_a_killed_run_of_a_mixture(tmp_path: Path, nursery: Nursery, mixture: Variant) -> None:
    assert_proven(nursery, tmp_path, mixture, 10, [[(3, 1), (1, 0)]])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["lanes_and_windows", "mixture"])
def test_many_lives(tmp_path: Path, nursery: Nursery, name: str, request: pytest.FixtureRequest) -> None:
    """Twelve runs of five lives each: numbers of ranks and workers, and the moments of death, from fixed seeds."""
    dice = random.Random(name)
    runs = [[(dice.randint(1, 4), dice.randint(0, 3)) for _ in range(5)] for _ in range(12)]
    assert_proven(nursery, tmp_path, request.getfixturevalue(name), 48, runs)
