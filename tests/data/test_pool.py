"""Workers die, hang and lie; the stream does not change by a byte, and only what kills twice is left out."""

from __future__ import annotations

import faulthandler
import functools
import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_shards import png, shard
from lives import gone

from seer.data import assembly, pool
from seer.data.crops import CropSpec
from seer.data.decode import BadImage, ImageLimits, open_image
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.pool import BatchPool
from seer.data.sources import ShardReader
from seer.data.stream import Batch, DataStream, QuarantinedSample
from seer.errors import UserError
from seer.shard_index import ShardIndex, index_path, save_index
from seer.shard_list import ShardList

SPECS = [CropSpec(2, 16, 0.3, 1.0), CropSpec(2, 8, 0.1, 0.4)]
COUNTS = (19, 23)
DIGEST = "0" * 32


def image(number: int) -> bytes:
    return png(np.random.default_rng(number).integers(0, 256, (20 + number % 7, 24, 3), np.uint8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardList:
    folder = tmp_path_factory.mktemp("shards")
    found = []
    for number, count in enumerate(COUNTS):
        samples = [(image(100 * number + sample), -1) for sample in range(count)]
        samples[(2, 15)[number]] = (b"<html>", -1)
        found.append(shard(folder / f"train-{number}.tar", samples))
    return ShardList(found)


def open_stream(
    shards: ShardList, workers: int, *, batch: int = 20, deadline: float = 60.0, decoder: str = "pillow"
) -> DataStream:
    return DataStream(
        shards,
        seed=3,
        global_batch_size=batch,
        crops=SPECS,
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        decoder=decoder,
        workers=workers,
        deadline_seconds=deadline,
    )


def digest(batch: Batch) -> str:
    state = hashlib.blake2b(f"{batch.batch_index} {batch.bad}".encode())
    for tensor in (*batch.crops, *batch.photometric):
        state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def digests(stream: DataStream, count: int, *, first: int = 1, between: Callable[[], object] = int) -> list[str]:
    try:
        found = []
        for batch in itertools.islice(stream.batches(first), count):
            found.append(digest(batch))
            between()
        return found
    finally:
        stream.close()


@pytest.fixture
def forks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced workers too are forked: they come with what a test has put in the place of the decoder."""
    start = BatchPool._start
    monkeypatch.setattr(BatchPool, "_start", lambda pool, number, fork: start(pool, number, fork=True))


def inject(monkeypatch: pytest.MonkeyPatch, victims: dict[bytes, Callable[[], object]]) -> None:
    """Something else happens where the header of one of the images is to be read."""

    def opened(data: bytes, *limits: ImageLimits) -> object:
        victims.get(data, int)()
        return open_image(data, *limits)

    monkeypatch.setattr(assembly, "open_image", opened)


def raised(error: Exception) -> Callable[[], object]:
    def throw() -> None:
        raise error

    return throw


def killed(number: int) -> Callable[[], object]:
    # Without pytest's words about a segmentation fault.
    return lambda: (faulthandler.disable(), os.kill(os.getpid(), number))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_no_byte(shards: ShardList, workers: int) -> None:
    stream = open_stream(shards, workers)
    assert digests(stream, 7) == digests(open_stream(shards, 0), 7)
    assert stream.quarantine == set()


@pytest.mark.parametrize("batch", [1, 9, 42])
def test_batches_of_any_size(shards: ShardList, batch: int) -> None:
    assert digests(open_stream(shards, 2, batch=batch), 5) == digests(open_stream(shards, 0, batch=batch), 5)


def test_rows_are_the_same_however_a_batch_is_cut(shards: ShardList) -> None:
    maker = open_stream(shards, 0, batch=40)._assembler
    whole, parts = ([np.zeros(shape, kind) for shape, kind in maker.layout] for _ in range(2))
    bad = maker.fill(4, range(40), whole[:2], whole[2:])
    cuts = [0, 1, 17, 39, 40]
    found = [maker.fill(4, range(*cut), parts[:2], parts[2:]) for cut in itertools.pairwise(cuts)]
    assert all(np.array_equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert list(itertools.chain(*found)) == bad != []


def test_a_worker_started_anew_makes_the_same_and_has_no_torch(
    shards: ShardList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    stream = open_stream(shards, 1)
    maps = []

    def look() -> None:
        maps.append(Path(f"/proc/{stream.worker_pids[0]}/maps").read_text())

    assert digests(stream, 4, between=look) == digests(open_stream(shards, 0), 4)
    assert "libtorch" not in maps[0] and "_imaging" in maps[0]
    assert "libtorch" in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("anew", [False, True])
def test_workers_that_resize_with_torch_make_the_same(
    shards: ShardList, anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked beside the threads of torch, or started without it."""
    pytest.importorskip("simplejpeg")
    torch.ones(1 << 20).sum()  # torch's threads are there before the fork
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: anew)
    inline = digests(open_stream(shards, 0, decoder="simplejpeg"), 4)
    assert digests(open_stream(shards, 1, decoder="simplejpeg"), 4) == inline
    assert inline != digests(open_stream(shards, 0), 4)


def test_killed_workers_change_no_byte(shards: ShardList, forks_only: None) -> None:
    stream, dice = open_stream(shards, 3), random.Random(0)

    def kill() -> None:
        time.sleep(dice.uniform(0, 0.004))  # at whatever the workers are then
        for pid in dice.sample(stream.worker_pids, dice.choice([0, 1, 1, 3])):
            os.kill(pid, signal.SIGKILL)

    deaths = []
    found = digests(stream, 25, between=lambda: (kill(), deaths.append(stream.worker_deaths)))
    assert found == digests(open_stream(shards, 0), 25)
    assert deaths[-1] > 10 and stream.quarantine == set()


def test_a_killed_worker_is_replaced_by_one_that_was_started_anew(shards: ShardList) -> None:
    stream, handler = open_stream(shards, 1), signal.getsignal(signal.SIGCHLD)
    pids: list[int] = []

    def kill() -> None:
        pids.extend(stream.worker_pids)
        if len(pids) == 2:
            os.kill(pids[0], signal.SIGKILL)

    assert digests(stream, 8, between=kill) == digests(open_stream(shards, 0), 8)
    assert len(set(pids)) == 2 and signal.getsignal(signal.SIGCHLD) is handler


def test_a_stopped_worker_is_replaced_after_the_deadline(shards: ShardList, forks_only: None) -> None:
    stream, pids = open_stream(shards, 2, deadline=0.1), []

    def stop() -> None:
        pids.extend(stream.worker_pids)
        if len(pids) == 4:
            os.kill(pids[0], signal.SIGSTOP)

    assert digests(stream, 8, between=stop) == digests(open_stream(shards, 0), 8)
    assert len(set(pids)) == 3 and not Path(f"/proc/{pids[0]}").exists() and stream.quarantine == set()


@pytest.mark.parametrize(
    ("death", "count"),
    [
        (functools.partial(os._exit, 3), 2),
        (killed(signal.SIGSEGV), 2),
        (killed(signal.SIGKILL), 3),  # comes from outside more often than from an image
        (functools.partial(time.sleep, 60), 2),
    ],
    ids=["exit", "segfault", "kill", "hang"],
)
def test_a_sample_that_kills_its_worker_is_replaced(
    shards: ShardList, forks_only: None, monkeypatch: pytest.MonkeyPatch, death: Callable[[], object], count: int
) -> None:
    victim = image(104)
    inject(monkeypatch, {victim: raised(BadImage("killed_worker"))})
    expected = digests(open_stream(shards, 0), 6)
    inject(monkeypatch, {victim: death})
    stream, deaths = open_stream(shards, 2, deadline=0.2), []
    found = digests(stream, 6, between=lambda: deaths.append(stream.worker_deaths))
    assert found == expected
    assert stream.quarantine == {("train-1.tar", DIGEST, 4)}
    assert stream.identity()["quarantine"] == [["train-1.tar", DIGEST, 4]]
    # Two workers may have met it in different batches before it was known.
    assert count <= deaths[-1] <= 2 * count
    # It is remembered by the stream, for workers and for none.
    assert digests(stream, 6) == expected


def test_a_substitute_that_kills_is_replaced_too(
    shards: ShardList, forks_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    victims = [image(3), image(4)]  # those that follow the broken one
    inject(monkeypatch, dict.fromkeys(victims, raised(BadImage("killed_worker"))))
    expected = digests(open_stream(shards, 0), 5)
    inject(monkeypatch, dict.fromkeys(victims, killed(signal.SIGABRT)))
    stream = open_stream(shards, 2)
    assert digests(stream, 5) == expected
    assert stream.quarantine == {("train-0.tar", DIGEST, 3), ("train-0.tar", DIGEST, 4)}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_others_found_is_replaced_and_nobody_dies_of_it(
    shards: ShardList, forks_only: None, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    inject(monkeypatch, {image(104): raised(BadImage("killed_worker"))})
    expected = digests(open_stream(shards, 0), 6)
    inject(monkeypatch, {image(104): killed(signal.SIGABRT)})
    stream, deaths = open_stream(shards, workers), []
    stream.add_to_quarantine(QuarantinedSample("train-1.tar", digest, 4) for digest in (DIGEST, "another"))
    stream.add_to_quarantine([QuarantinedSample("gone.tar", DIGEST, 4)])
    assert stream.quarantine == {("train-1.tar", DIGEST, 4)}
    assert digests(stream, 6, between=lambda: deaths.append(stream.worker_deaths)) == expected
    assert deaths[-1] == 0


def test_workers_that_run_learn_what_others_found(shards: ShardList, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = open_stream(shards, 2)
    batches = stream.batches(0)
    next(batches)
    stream.add_to_quarantine(QuarantinedSample(f"train-{tar}.tar", DIGEST, 7) for tar in (0, 1))
    later = list(itertools.islice(batches, 12))[6:]  # those before were begun
    stream.close()
    again = open_stream(shards, 0)
    again.add_to_quarantine(stream.quarantine)
    assert [batch.bad for batch in later] == [batch.bad for batch in itertools.islice(again.batches(7), 6)]
    assert {(Path(bad.shard).name, bad.sample) for batch in later for bad in batch.bad if bad.reason == "killed_worker"}


def test_tars_that_share_a_name_are_told_apart_by_their_digest(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = shard(tmp_path / "a" / "0.tar", [(image(number), -1) for number in range(20)])
    other = shard(tmp_path / "b" / "0.tar", [(image(number), -1) for number in range(20, 40)])
    stream = open_stream(ShardList([replace(one, digest="1" * 32), replace(other, digest="2" * 32)]), 0)
    stream.add_to_quarantine([QuarantinedSample("0.tar", "2" * 32, 3)])
    assert stream._assembler.quarantine == {(1, 3)}


def test_the_first_death_is_told_in_one_line(
    shards: ShardList, forks_only: None, capfd: pytest.CaptureFixture[str]
) -> None:
    stream, told = open_stream(shards, 2), []

    def kill() -> None:
        told.append(capfd.readouterr().err)
        if stream.worker_deaths < 4:
            os.kill(stream.worker_pids[0], signal.SIGKILL)

    digests(stream, 20, between=kill)
    (line,) = "".join(told).splitlines()
    assert line.startswith("seer: a data worker died (by SIGKILL: out of memory?)") and "data.workers" in line


def test_what_dies_of_its_predecessor_is_not_blamed(
    shards: ShardList, forks_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests(open_stream(shards, 0), 5)
    left: list[int] = []

    def corrupt() -> None:
        left.append(3)  # the third image after this one dies of it

    def opened(data: bytes, *limits: ImageLimits) -> object:
        if left:
            left[0] -= 1
            if left[0] == 0:
                os._exit(1)
        if data == image(108):
            corrupt()
        return open_image(data, *limits)

    monkeypatch.setattr(assembly, "open_image", opened)
    stream, deaths = open_stream(shards, 2), []
    assert digests(stream, 5, between=lambda: deaths.append(stream.worker_deaths)) == expected
    assert stream.quarantine == set() and deaths[-1] > 0


def test_a_shard_that_keeps_everybody_waiting_is_named_once(
    shards: ShardList,
    forks_only: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    expected = digests(open_stream(shards, 0), 7)
    monkeypatch.setattr(pool, "SILENT_SECONDS", 0.5)
    once, read = tmp_path / "once", ShardReader.read

    def reading(reader: ShardReader, shard: ShardIndex, sample: int, alive: Callable[[], None]) -> bytes:
        data = read(reader, shard, sample, alive)
        if data == image(101) and not once.exists():
            once.touch()
            time.sleep(3.5)
        return data

    monkeypatch.setattr(ShardReader, "read", reading)
    assert digests(open_stream(shards, 2), 7) == expected
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and "nothing came of shard" in told[0] and "are read again, after" in told[1]


def test_a_bug_in_a_worker_is_told_with_its_traceback(
    shards: ShardList, forks_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, {image(7): raised(ZeroDivisionError("of the worker"))})
    stream = open_stream(shards, 2)
    with pytest.raises(RuntimeError, match=r"(?s)data worker failed.*in throw.*ZeroDivisionError: of the worker"):
        digests(stream, 6)
    assert stream.worker_pids == []


def test_workers_that_only_die_are_one_error(
    shards: ShardList, forks_only: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "open_image", lambda *_: killed(signal.SIGILL)())
    with pytest.raises(UserError, match=r"workers died one after another \(the last one by SIGILL, at sample \d+ of"):
        digests(open_stream(shards, 2), 1)


def test_a_batch_holds_until_the_one_after_next(shards: ShardList) -> None:
    for workers in (0, 2):
        stream = open_stream(shards, workers)
        batches = stream.batches(0)
        before, places = None, set()
        for _ in range(12):
            batch = next(batches)
            time.sleep(0.01)  # the workers fill what they may
            assert before is None or digest(before[0]) == before[1]
            before = batch, digest(batch)
            places.add(batch.crops[0].data_ptr())
        assert len(places) == (2 if workers == 0 else stream._pool._ring.slots)  # and no more memory than that
        stream.close()
        assert digest(before[0]) == before[1]


def test_opened_again_and_closed_twice(shards: ShardList) -> None:
    files = len(os.listdir("/proc/self/fd"))
    stream = open_stream(shards, 2)
    inline = digests(open_stream(shards, 0), 9, first=0)
    for first in (0, 5, 2):
        batches = stream.batches(first)
        assert [digest(next(batches)) for _ in range(3)] == inline[first : first + 3]
    pids = stream.worker_pids
    stream.close()
    stream.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    stream.batches(3)  # and not one is taken
    stream.close()
    assert len(os.listdir("/proc/self/fd")) <= files + len(COUNTS)  # the tars may stay open


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_stays_flat(shards: ShardList, workers: int) -> None:
    stream, sizes = open_stream(shards, workers, batch=8), []
    for number, _ in enumerate(itertools.islice(stream.batches(0), 300)):
        if number % 50 == 49:
            sizes.append([resident(pid) for pid in (os.getpid(), *stream.worker_pids)])
    stream.close()
    for early, late in zip(sizes[1], sizes[-1], strict=True):
        assert late - early < 1 << 20, sizes


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_fork_leaves_the_workers_to_its_parent(shards: ShardList) -> None:
    stream = open_stream(shards, 2)
    batches = stream.batches(0)
    if (pid := os.fork()) == 0:
        stream.close()
        os._exit(0)
    os.waitpid(pid, 0)
    first, count = stream.worker_pids, sum(1 for _ in itertools.islice(batches, 9))
    assert count == 9 and stream.worker_pids == first and stream.worker_deaths == 0
    stream.close()


PARENT = """
import sys, threading, time
from pathlib import Path
from seer.data.crops import CropSpec
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import DataStream
from seer.shard_list import ShardList

stream = DataStream(ShardList.open(sys.argv[1]), seed=0, global_batch_size=20, crops=[CropSpec(1, 8, 0.5, 1.0)],
                    flip_probability=0.5, photometric=PhotometricSpec(), workers=2)
if sys.argv[2] == "anew":
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
batches = stream.batches(0)
next(batches)
print(*stream.worker_pids, flush=True)
while True:
    next(batches)
"""


@pytest.mark.parametrize("how", ["forked", "anew"])
def test_kill_of_the_main_process_leaves_nothing(tmp_path: Path, shards: ShardList, how: str) -> None:
    for index in shards:
        save_index(index, index_path(index.location))
    pattern = str(Path(shards[0].location).parent / "*.tar")
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, pattern, how],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 2
        assert all((b"serve_anew" in Path(f"/proc/{pid}/cmdline").read_bytes()) == (how == "anew") for pid in pids)
        # What has no name cannot stay behind.
        assert not any("/dev/shm/" in Path(f"/proc/{pid}/maps").read_text() for pid in (process.pid, *pids))
        os.kill(pids[0], signal.SIGSTOP)  # this one cannot see the end of its parent
        process.kill()
    assert gone(pids)
