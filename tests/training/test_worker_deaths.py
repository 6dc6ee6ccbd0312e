"""A sample that kills its worker is found once: by no other rank after a save, and by no later life of the run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from ranks import ranks
from tiny_run import NARROW, tiny_config

from seer.checkpoint.store import CheckpointStore
from seer.data import assembly
from seer.data.order import ShardOrder
from seer.data.pool import BatchPool
from seer.data.sources import ShardReader
from seer.shard_list import ShardList
from seer.training import loop

STEPS = 12  # two epochs of 48 images
SLOTS = np.arange(8)
Victim = tuple[str, int]


def met_in(shards: str, batch: int, slot: int) -> tuple[str, str, int]:
    """Name and digest of the tar, and place in it, of what stands in a slot of 8."""
    found = ShardList.open(shards)
    at, place = ShardOrder(found.counts, seed=0, global_batch_size=8).positions(batch, SLOTS[slot : slot + 1])
    tar = found.listed[int(at[0])]
    return tar.name, tar.digest, int(place[0])


def train(run: str, shards: str, victim: Victim, workers: int, stop_after: int | None) -> tuple[int, int]:
    """A run in which every process that opens one of the samples dies; how it ended, and deaths on this rank."""
    step, start, read, opened = loop.train_step, BatchPool._start, ShardReader.read, assembly.open_image
    deaths: list[int] = []
    at: list[Victim] = []

    def noted(reader: ShardReader, shard: Any, sample: int, *more: Any) -> bytes:
        at[:] = [(shard.name, sample)]
        return read(reader, shard, sample, *more)

    def deadly(*arguments: Any) -> Any:
        if at == [victim]:
            os._exit(3)
        return opened(*arguments)

    def taken(state: Any, *args: Any, **more: Any) -> Any:
        deaths.append(more["worker_deaths"])
        if state.step + 1 == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
            more["requests"] = (True, False)
        return step(state, *args, **more)

    loop.train_step, ShardReader.read, assembly.open_image = taken, noted, deadly  # type: ignore[assignment, method-assign]
    BatchPool._start = lambda pool, number, fork: start(pool, number, fork=True)  # type: ignore[method-assign]
    try:
        more = (f"train.steps={STEPS}", f"data.workers={workers}", "data.max_bad_share=1")
        config = tiny_config(Path(run), shards, *NARROW, *more)
        return loop.run(config).exit_code, deaths[-1]
    finally:
        loop.train_step, ShardReader.read, assembly.open_image = step, read, opened
        BatchPool._start = start  # type: ignore[method-assign]


def saved(run: Path) -> Any:
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    return newest.state["quarantine"]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_found_by_one_rank_known_to_all_and_to_any_number_of_ranks_later(tmp_path: Path, shards: str) -> None:
    name, digest, place = met_in(shards, 1, 6)
    whole = tmp_path / "whole"
    code, deaths = train(str(whole), shards, (name, place), 1, None)
    assert (code, deaths) == (0, 2) and saved(whole) == [[name, digest, place]]
    expected = [(line["step"], line["sample"], line["reason"]) for line in lines(whole / "quarantine" / "rank-0.jsonl")]
    assert len(expected) == 2 and {line[1:] for line in expected} == {(place, "killed_worker")}, "once an epoch"

    run = tmp_path / "run"
    first = ranks(2).run(train, str(run), shards, (name, place), 1, 3)
    assert first == [(75, 0), (75, 2)], "in the second half of the second batch"
    assert saved(run) == [[name, digest, place]]
    assert ranks(2).run(train, str(run), shards, (name, place), 2, 5) == [(75, 0), (75, 0)]
    assert train(str(run), shards, (name, place), 1, None) == (0, 0)
    result = json.loads((run / "result.json").read_text())
    assert result["worker_deaths"] == 2
    assert {line["worker_deaths"] for line in lines(run / "metrics.jsonl") if line["step"] > 2} == {2}
    told = [line for rank in (0, 1) for line in lines(run / "quarantine" / f"rank-{rank}.jsonl")]
    assert sorted((line["step"], line["sample"], line["reason"]) for line in told) == expected


def test_what_one_rank_found_spares_the_others_after_a_save(tmp_path: Path, shards: str) -> None:
    """The sample stands in the second half of a batch, and an epoch later in the first half."""
    found = ShardList.open(shards)
    order = ShardOrder(found.counts, seed=0, global_batch_size=8)
    half = [
        {
            where: slot // 4
            for batch in range(first, first + 6)
            for slot, where in enumerate(zip(*(part.tolist() for part in order.positions(batch, SLOTS)), strict=True))
        }
        for first in (0, 6)
    ]
    shard, place = next(where for where in half[0] if half[0][where] == 1 and half[1].get(where) == 0)
    victim = (found.listed[shard].name, place)
    assert ranks(2).run(train, str(tmp_path / "run"), shards, victim, 1, None) == [(0, 0), (0, 2)]
