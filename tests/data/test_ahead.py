"""Images that are asked for ahead: the same batches in the same order, several requests under way, never too many."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_shards import png, shard
from indexed_shards import shard as tar_of_nothing
from remote_servers import WebServer, s3_server, web_server

from seer import remote
from seer.data import ahead, assembly
from seer.data.ahead import AT_ONCE, ReadAhead
from seer.data.crops import CropSpec
from seer.data.decode import ImageLimits, open_image
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.pool import BatchPool
from seer.data.stream import DataStream
from seer.errors import UserError
from seer.remote import Reading
from seer.shard_index import ShardIndex, index_path, save_index
from seer.shard_list import ShardList
from seer.shard_manifest import entry, write

COUNTS = (30, 20, 26)
BATCH = 16
APART = Reading(cache_bytes=0, patience=30.0)


# ---- in this process, with a request that is a function ----


@pytest.fixture
def nothing(tmp_path: Path) -> ShardList:
    """Shard 0 has 90 images, number n of n bytes."""
    return ShardList([tar_of_nothing(tmp_path / "a.tar", 90)])


def wanted(count: int, first: int = 0) -> list[tuple[tuple[int, int], int, int]]:
    return [((0, number), 0, number) for number in range(first, first + count)]


def at_rest(threads: int) -> bool:
    end = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.005)
    return threading.active_count() == threads


class Slow:
    """A request that takes its time, and counts how many are under way together."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.under_way, self.most, self.order = seconds, 0, list[int](), list[int]()
        self._lock = threading.Lock()

    def __call__(self, shard: ShardIndex, sample: int) -> bytes:
        with self._lock:
            self.under_way += 1
            self.most.append(self.under_way)
            self.order.append(sample)
        time.sleep(self.seconds)
        with self._lock:
            self.under_way -= 1
        return bytes([sample]) * sample


def test_many_are_under_way_together_and_threads_end(nothing: ShardList) -> None:
    before, slow = threading.active_count(), Slow()
    reader = ReadAhead(nothing, slow, 100)
    reader.want(wanted(80, 1))
    for number in range(1, 81):
        assert reader.take((0, number), int) == bytes([number]) * number
    # The first one is alone: a server that knows no ranges shows itself.
    assert slow.most[:2] == [1, 1] and AT_ONCE // 2 < max(slow.most) <= AT_ONCE
    assert at_rest(before)
    assert reader.take((0, 3), int) is None  # once


def test_bytes_are_bounded_and_the_next_one_always_comes(nothing: ShardList, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_BYTES", 150)
    before, reader, most = threading.active_count(), ReadAhead(nothing, Slow(0.001), 60), 0
    for first in (0, 100):  # two tasks
        reader.want(((first, number), 0, 89 - number) for number in range(90))
    for first in (0, 100):
        for number in range(90):
            if number % 7 == 0:
                time.sleep(0.01)  # they run ahead as far as they may
            most = max(most, reader._held)
            size = 89 - number
            assert reader.take((first, number), int) == (bytes([size]) * size if size <= 60 else None)
    assert 100 < most <= 150 + 60
    assert at_rest(before) and reader._held == 0


def test_failures_are_told_in_the_order_of_rows(nothing: ShardList) -> None:
    def failing(shard: ShardIndex, sample: int) -> bytes:
        time.sleep(0.05 if sample == 10 else 0)
        if sample in (10, 12):
            raise UserError(f"sample {sample}", "it is gone", "bring it back")
        return b"x"

    before, reader = threading.active_count(), ReadAhead(nothing, failing, 100)
    reader.want(wanted(5, 9))
    assert reader.take((0, 9), int) == b"x"
    with pytest.raises(UserError, match="sample 10"):
        reader.take((0, 10), int)
    reader.forget((0, row) for row in range(9, 14))
    assert at_rest(before) and reader._held == 0
    reader.want(wanted(1, 11))
    assert reader.take((0, 11), int) == b"x"


def test_what_is_forgotten_is_not_asked_for(nothing: ShardList) -> None:
    before, slow = threading.active_count(), Slow(0.2)
    reader = ReadAhead(nothing, slow, 100)
    reader.want(wanted(80, 1))
    reader.forget((0, number) for number in range(1, 80))
    assert len(reader._waiting) <= 1
    assert reader.take((0, 80), int) == bytes([80]) * 80
    assert slow.order[-1] == 80 and len(slow.order) <= 2
    assert at_rest(before) and reader._held == 0


def test_whoever_waits_is_told_that_it_moves(nothing: ShardList) -> None:
    """Loading an index and reading an image have a patience each."""
    alive: list[str] = []
    reader = ReadAhead(nothing, lambda shard, sample: (time.sleep(0.1), alive.append("read"), b"x")[-1], 100)
    reader.want(wanted(1, 5))
    assert reader.take((0, 5), lambda: alive.append("alive")) == b"x"
    assert alive == ["alive", "read"]


def test_without_threads_everything_is_read_in_the_usual_way(
    nothing: ShardList, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    reader = ReadAhead(nothing, Slow(), 100)
    reader.want(wanted(3))
    assert [reader.take((0, number), int) for number in range(3)] == [None] * 3


# ---- batches from servers ----


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.02)


def image(number: int) -> bytes:
    return png(np.random.default_rng(number).integers(0, 256, (20 + number % 7, 24, 3), np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards with bad images, indexes and a list."""
    folder, entries = tmp_path_factory.mktemp("shards"), []
    for number, count in enumerate(COUNTS):
        samples = [(image(100 * number + sample), -1) for sample in range(count)]
        for bad in (3, 4, 17):
            samples[bad] = (b"<html>", -1)
        tar = folder / f"train-{number}.tar"
        index = shard(tar, samples)
        index = replace(index, digest=hashlib.blake2b(tar.read_bytes(), digest_size=16).hexdigest())
        save_index(index, index_path(index.location))
        entries.append(entry(index, index.name))
    write(folder, entries)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[WebServer]:
    with web_server(folder) as found:
        yield found


def away(server: WebServer, reading: Reading = APART) -> ShardList:
    return ShardList.open(f"{server.url}/train-{{0..2}}.tar", reading=reading)


def stream(shards: ShardList, workers: int, **options: Any) -> DataStream:
    return DataStream(
        shards,
        seed=3,
        global_batch_size=BATCH,
        crops=[CropSpec(2, 16, 0.3, 1.0)],
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        workers=workers,
        **options,
    )


def taken(opened: DataStream, count: int = 5) -> list[tuple[bytes, list[tuple[int, str]]]]:
    """Bytes and bad samples of the first batches."""
    try:
        batches = opened.batches(0)
        made = []
        for _ in range(count):
            batch = next(batches)
            made.append((batch.crops[0].numpy().tobytes(), [(bad.sample, bad.reason) for bad in batch.bad]))
        return made
    finally:
        opened.close()


@pytest.fixture(scope="module")
def local(folder: Path) -> list[tuple[bytes, list[tuple[int, str]]]]:
    found = taken(stream(ShardList.open(f"{folder}/*.tar"), 0))
    assert sum(len(bad) for _, bad in found) > 8
    return found


class Counted:
    """A fault that counts the requests for tars that are under way; too many of them are refused."""

    def __init__(self, allowed: int = 1000) -> None:
        self.allowed, self.under_way, self.most, self.refused = allowed, 0, 0, 0
        self._lock = threading.Lock()

    def __call__(self, path: str, number: int) -> str | None:
        if not path.endswith(".tar"):
            return None
        with self._lock:
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            refused = self.under_way > self.allowed
            self.refused += refused
        time.sleep(0.01)
        with self._lock:
            self.under_way -= 1
        return "503" if refused else None


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_many_requests_at_a_time(
    server: WebServer, local: list[tuple[bytes, list[tuple[int, str]]]], workers: int
) -> None:
    server.fault = counted = Counted()
    assert taken(stream(away(server), workers), 2) == local[:2]
    assert counted.most > BATCH // 2


def test_shards_without_room_are_asked_for_ahead_too(
    server: WebServer, tmp_path: Path, local: list[tuple[bytes, list[tuple[int, str]]]]
) -> None:
    server.fault = counted = Counted()
    assert taken(stream(away(server, Reading(str(tmp_path / "cache"), 1000)), 0), 2) == local[:2]
    assert counted.most > BATCH // 4


def test_a_server_that_refuses_all_but_three_is_backed_off_from(
    server: WebServer, local: list[tuple[bytes, list[tuple[int, str]]]]
) -> None:
    server.fault = counted = Counted(allowed=3)
    assert taken(stream(away(server), 0), 2) == local[:2]
    assert counted.refused > 5


@pytest.mark.slow
def test_batches_from_s3(folder: Path, local: list[tuple[bytes, list[tuple[int, str]]]]) -> None:
    with s3_server() as endpoint:
        import boto3

        bucket = boto3.resource("s3", endpoint_url=endpoint).create_bucket(Bucket="shards")
        for file in folder.iterdir():
            bucket.put_object(Key=f"web/{file.name}", Body=file.read_bytes())
        shards = ShardList.open("s3://shards/web/*.tar", reading=APART)
        for workers in (0, 2):
            assert taken(stream(shards, workers)) == local


def test_the_rows_of_the_next_task_are_asked_for_too(server: WebServer) -> None:
    """A worker that waits for an image of its first task."""
    tars = lambda: sum(path.endswith(".tar") for path in server.requests)  # noqa: E731
    server.fault = lambda path, number: "stall" if path.endswith(".tar") and tars() == 2 else None
    opened = stream(away(server), 1)
    opened.batches(0)
    end = time.monotonic() + 10
    while tars() < 2 * BATCH:  # of three batches in tasks of eight
        assert time.monotonic() < end
        time.sleep(0.01)
    opened.close()


def test_a_server_that_knows_no_ranges_sends_one_shard(server: WebServer) -> None:
    server.fault = lambda path, number: "whole"
    with pytest.raises(UserError, match=r"no ranges; .*data\.cache_gb"):
        taken(stream(away(server), 0))
    assert sum(path.endswith(".tar") for path in server.requests) == 1


def test_a_shard_that_is_gone_is_told_at_once(server: WebServer) -> None:
    shards = away(server)
    server.fault = lambda path, number: "404" if path.endswith(".tar") else None
    start = time.monotonic()
    with pytest.raises(UserError, match=r"train-\d\.tar does not exist"):
        taken(stream(shards, 2))
    assert time.monotonic() - start < 20


def test_a_server_that_is_gone_is_told_once(server: WebServer, capfd: pytest.CaptureFixture[str]) -> None:
    shards = away(server, APART._replace(patience=0.5))
    server.fault = lambda path, number: "503" if path.endswith(".tar") else None
    with pytest.raises(UserError, match=r"train-\d\.tar cannot be read \(the server answers 503\)"):
        taken(stream(shards, 1))
    out, err = capfd.readouterr()
    assert not out and not err


@pytest.mark.slow
def test_a_slow_server_is_no_hang(server: WebServer) -> None:
    """An index and an image that come in time, each by itself, but not together."""
    shards = away(server)
    server.fault = lambda path, number: time.sleep(1.2) if number == (path == "/train-0.tar.seer.npz") else None
    opened = stream(shards, 1, deadline_seconds=0.4)  # five times as long for reading
    batches = opened.batches(0)
    next(batches)
    assert opened.worker_deaths == 0
    opened.close()


@pytest.mark.slow
def test_an_image_that_kills_is_blamed_while_others_are_read(
    server: WebServer, local: list[tuple[bytes, list[tuple[int, str]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, deadly = BatchPool._start, image(7)
    monkeypatch.setattr(BatchPool, "_start", lambda pool, number, fork: start(pool, number, fork=True))

    def opened(data: bytes, *limits: ImageLimits) -> object:
        if data == deadly:
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return open_image(data, *limits)

    monkeypatch.setattr(assembly, "open_image", opened)
    found = taken(stream(away(server), 1))
    bad = [one for _, batch in found for one in batch]
    assert bad.count((7, "killed_worker")) >= 1
    assert {one for one in bad if one[1] == "killed_worker"} == {(7, "killed_worker")}
    others = [one for _, batch in local for one in batch]
    assert sorted(one for one in bad if one[1] != "killed_worker") == sorted(others)


def test_files_start_no_thread(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: object) -> None:
        raise AssertionError("a thread")

    monkeypatch.setattr(threading.Thread, "start", started)
    taken(stream(ShardList.open(f"{folder}/*.tar"), 0), 1)


@pytest.mark.parametrize("gigabytes", [0.0, 1.0])
def test_indexes_are_asked_for_together(server: WebServer, tmp_path: Path, gigabytes: float) -> None:
    """Of shards in the cache too: a worker that begins waits once, and not once a shard."""
    under_way, most, lock = 0, 0, threading.Lock()

    def fault(path: str, number: int) -> None:
        nonlocal under_way, most
        if path.endswith(".npz"):
            with lock:
                under_way += 1
                most = max(most, under_way)
            time.sleep(0.2)
            with lock:
                under_way -= 1

    shards = away(server, Reading(str(tmp_path / "cache"), round(gigabytes * 1e9)))
    shards = pickle.loads(pickle.dumps(shards))  # without the index that opening looked at
    server.fault = fault
    taken(stream(shards, 0), 1)
    assert most == len(COUNTS)


def test_a_pickled_list_loads_its_indexes_again(server: WebServer) -> None:
    """By threads together, each once."""
    shards: ShardList = pickle.loads(pickle.dumps(away(server)))
    server.requests.clear()
    threads = [threading.Thread(target=lambda number=number: shards[number % 3]) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(server.requests) == [f"/train-{number}.tar.seer.npz" for number in range(3)]
