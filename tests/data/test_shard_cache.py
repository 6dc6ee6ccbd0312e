"""The cache of remote shards: one download, nothing trusted that was not compared, a bound that always holds."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from remote_servers import WebServer, web_server

from seer.data.shard_cache import ShardCache
from seer.errors import UserError
from seer.remote import Reading

SIZE = 50_000


class Tar(NamedTuple):
    location: str
    tar_size: int
    digest: str


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "tars").mkdir()
    with web_server(tmp_path / "tars") as found:
        yield found


def tars_of(server: WebServer, count: int, size: int = SIZE) -> list[Tar]:
    made = []
    for number in range(count):
        data = random.Random(number).randbytes(size)
        (server.folder / f"{number}.tar").write_bytes(data)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        made.append(Tar(f"{server.url}/{number}.tar", size, digest))
    return made


def cache_of(
    tmp_path: Path, shards: float = 100, io_timeout: float = 20.0, said: list[str] | None = None
) -> ShardCache:
    reading = Reading(str(tmp_path / "cache"), int(shards * SIZE), io_timeout)
    return ShardCache(reading, (said if said is not None else []).append)


def content(cache: ShardCache, tar: Tar) -> bytes | None:
    file = cache.open(tar)
    if file is None:
        return None
    data = os.pread(file, 10 * tar.tar_size, 0)
    os.close(file)
    return data


def source(server: WebServer, tar: Tar) -> bytes:
    return (server.folder / tar.location.rpartition("/")[2]).read_bytes()


def files(tmp_path: Path) -> list[str]:
    """What takes space in the cache."""
    return sorted(name for name in os.listdir(tmp_path / "cache") if ".shard" in name or ".part" in name)


# A process that opens shards by number, one a line of its input, and answers with the digest of what it got.
READER = """
import hashlib, json, os, sys
from seer import remote
from seer.data.shard_cache import ShardCache
from collections import namedtuple
Tar = namedtuple("Tar", "location tar_size digest")
reading, tars, part = json.loads(sys.argv[1])
remote.PART = part
cache = ShardCache(remote.Reading(*reading))
tars = [Tar(*tar) for tar in tars]
print("ready", flush=True)
for line in sys.stdin:
    word, *numbers = line.split()
    chosen = [tars[int(number)] for number in numbers]
    if word == "need":
        cache.publish(chosen, [])
        print("published", flush=True)
        continue
    file = cache.open(chosen[0])
    if file is None:
        print("none", flush=True)
        continue
    print(hashlib.blake2b(os.pread(file, 1 << 30, 0), digest_size=16).hexdigest(), flush=True)
    os.close(file)
"""


class Reader:
    def __init__(self, cache: ShardCache, tars: Sequence[Tar], part: int = 10_000) -> None:
        given = json.dumps([list(cache.reading), tars, part])
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str) -> None:
        assert self.process.stdin
        print(line, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def readers() -> Iterator[list[Reader]]:
    started: list[Reader] = []
    yield started
    for reader in started:
        reader.kill()


def test_a_shard_is_downloaded_once(server: WebServer, tmp_path: Path) -> None:
    tar = tars_of(server, 1)[0]
    for _ in range(2):
        cache = cache_of(tmp_path)
        assert content(cache, tar) == source(server, tar)
    assert server.requests == ["/0.tar"]
    signed = tar._replace(location=tar.location.replace("://", "://user:CANARY@") + "?sig=CANARY")
    assert content(cache, signed) == source(server, tar)  # another signature, the same shard
    assert len(server.requests) == 1 and files(tmp_path) == [f"{cache.name(tar)}.shard"]


def test_six_processes_download_once(server: WebServer, tmp_path: Path, readers: list[Reader]) -> None:
    tar = tars_of(server, 1)[0]
    server.fault = lambda path, number: "slow"
    cache = cache_of(tmp_path)
    readers += [Reader(cache, [tar]) for _ in range(6)]
    assert [reader.answer() for reader in readers] == ["ready"] * 6
    for reader in readers:
        reader.ask("open 0")
    assert [reader.answer() for reader in readers] == [tar.digest] * 6
    assert len(server.requests) == 5  # the parts of one download
    assert files(tmp_path) == [f"{cache.name(tar)}.shard"]


def test_a_killed_download_leaves_nothing_that_is_trusted(
    server: WebServer, tmp_path: Path, readers: list[Reader]
) -> None:
    tars = tars_of(server, 2)
    server.fault = lambda path, number: "stall" if number == 3 else None
    cache = cache_of(tmp_path)
    readers.append(Reader(cache, tars))
    readers[0].ask("open 0")
    while len(server.requests) < 4:
        time.sleep(0.01)
    (left,) = files(tmp_path)
    assert ".part-" in left
    readers[0].kill()
    assert files(tmp_path) == [left]
    assert content(cache, tars[1]) == source(server, tars[1])  # whoever makes room clears it away
    assert files(tmp_path) == [f"{cache.name(tars[1])}.shard"]
    assert content(cache, tars[0]) == source(server, tars[0])


def test_a_part_that_was_left_is_written_anew(server: WebServer, tmp_path: Path) -> None:
    tar = tars_of(server, 1)[0]
    cache = cache_of(tmp_path)
    cache._part(cache.name(tar)).write_bytes(b"x" * 2 * SIZE)
    assert content(cache, tar) == source(server, tar)


def test_a_shard_cut_by_somebody_is_downloaded_anew(server: WebServer, tmp_path: Path) -> None:
    tar = tars_of(server, 1)[0]
    cache = cache_of(tmp_path)
    content(cache, tar)
    os.truncate(tmp_path / "cache" / f"{cache.name(tar)}.shard", SIZE - 1)
    assert content(cache, tar) == source(server, tar)


@pytest.mark.parametrize("fault", ["flip", "404", "403"])
def test_what_is_not_the_shard_is_told_and_not_kept(server: WebServer, tmp_path: Path, fault: str) -> None:
    tar = tars_of(server, 1)[0]
    server.fault = lambda path, number: fault
    with pytest.raises(UserError, match=r"0\.tar.*stale" if fault != "403" else r"0\.tar is refused"):
        cache_of(tmp_path).open(tar)
    assert files(tmp_path) == []


def test_waiting_ends_where_the_downloader_is_stopped(server: WebServer, tmp_path: Path, readers: list[Reader]) -> None:
    tar = tars_of(server, 1)[0]
    server.fault = lambda path, number: "stall" if number == 1 else None
    cache = cache_of(tmp_path, io_timeout=1.0)
    readers.append(Reader(cache, [tar]))
    readers[0].ask("open 0")
    while len(server.requests) < 2:
        time.sleep(0.01)
    os.kill(readers[0].process.pid, signal.SIGSTOP)
    alive: list[int] = []
    assert cache.open(tar, lambda: alive.append(1)) is None  # to be read in parts
    assert alive


def test_waiting_goes_on_while_the_download_does(server: WebServer, tmp_path: Path) -> None:
    tar = tars_of(server, 1)[0]
    cache = cache_of(tmp_path, io_timeout=2.0)
    name, begun, alive = cache.name(tar), time.monotonic(), list[int]()
    part = cache._take(name)
    assert part is not None

    def download() -> None:
        while time.monotonic() - begun < 2.0:  # for longer than anybody waits without news
            os.utime(cache._part(name))
            time.sleep(0.05)
        cache._part(name).write_bytes(source(server, tar))
        cache._part(name).rename(tmp_path / "cache" / f"{name}.shard")
        os.close(part)

    downloader = threading.Thread(target=download)
    downloader.start()
    file = cache.open(tar, lambda: alive.append(1))
    downloader.join()
    assert file is not None and len(alive) > 5 and not server.requests
    os.close(file)


def test_an_open_shard_outlives_its_eviction(server: WebServer, tmp_path: Path) -> None:
    tars = tars_of(server, 2)
    cache = cache_of(tmp_path, shards=1)
    file = cache.open(tars[0])
    assert file is not None
    assert content(cache, tars[1]) == source(server, tars[1])
    assert files(tmp_path) == [f"{cache.name(tars[1])}.shard"]
    assert os.pread(file, SIZE, 0) == source(server, tars[0])
    os.close(file)


def test_what_is_needed_is_never_evicted(server: WebServer, tmp_path: Path, readers: list[Reader]) -> None:
    tars = tars_of(server, 5)
    cache = cache_of(tmp_path, shards=2.5)
    readers.append(Reader(cache, tars))
    readers[0].ask("need 0 1")
    assert [readers[0].answer() for _ in range(2)] == ["ready", "published"]
    for tar in tars[:2]:
        assert content(cache, tar) == source(server, tar)
    assert content(cache, tars[2]) is None  # a third would have to push one out
    assert cache.needed_bytes() == 2 * SIZE
    readers[0].ask("need 1 3")
    assert readers[0].answer() == "published"
    cache._no_room.clear()
    assert content(cache, tars[3]) == source(server, tars[3])
    assert files(tmp_path) == sorted(f"{cache.name(tars[number])}.shard" for number in (1, 3))
    readers[0].kill()  # the dead need nothing
    assert content(cache, tars[4]) == source(server, tars[4])
    assert cache.needed_bytes() == 0
    assert not [name for name in os.listdir(tmp_path / "cache") if name.startswith("needs-")]


def test_what_is_needed_now_goes_before_what_is_needed_later(server: WebServer, tmp_path: Path) -> None:
    tars = tars_of(server, 3)
    cache = cache_of(tmp_path, shards=2)
    cache.publish(now=tars[:2], later=[tars[2]])
    assert not cache.fetch(tars[2], 5.0)  # there is room, but not for all three
    assert cache.fetch(tars[0], 5.0) and cache.fetch(tars[1], 5.0)
    assert len(files(tmp_path)) == 2


def test_first_needed_first_evicted(server: WebServer, tmp_path: Path) -> None:
    tars = tars_of(server, 5)
    cache = cache_of(tmp_path, shards=3)
    cache.publish(tars[:3], [])
    for tar in (tars[2], tars[1], tars[0]):
        assert cache.fetch(tar, 5.0)
    cache.publish([tars[0], tars[2]], [])
    time.sleep(0.01)
    cache.publish([tars[2]], [])
    time.sleep(0.01)
    cache.publish([], [])
    for gone in (1, 0, 2):
        assert f"{cache.name(tars[gone])}.shard" in files(tmp_path)
        extra = tars_of(server, 9)[6 + gone]
        assert cache.fetch(extra, 5.0)
        assert f"{cache.name(tars[gone])}.shard" not in files(tmp_path)


def test_the_bound_holds_at_all_times(server: WebServer, tmp_path: Path, readers: list[Reader]) -> None:
    """Three processes want twelve shards in a cache of three, one of them is killed; somebody looks all the time."""
    tars = tars_of(server, 12)
    cache = cache_of(tmp_path, shards=3)
    most, over = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            # Names and sizes are not read at one moment: nobody renames, or makes room, meanwhile.
            with open(tmp_path / "cache" / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                paths = [tmp_path / "cache" / name for name in files(tmp_path)]
                used = 0
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):
                        used += path.stat().st_size
            most = max(most, used)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    readers += [Reader(cache, tars) for _ in range(3)]
    assert [reader.answer() for reader in readers] == ["ready"] * 3
    watcher.start()
    try:
        chance = random.Random(3)
        for turn in range(7):
            wanted = [chance.randrange(12) for _ in readers]
            for reader, number in zip(readers, wanted, strict=True):
                reader.ask(f"open {number}")
            if turn == 3:
                readers.pop().kill()
            for reader, number in zip(readers, wanted, strict=False):
                assert reader.answer() in (tars[number].digest, "none")
    finally:
        over.set()
        watcher.join()
    assert 2 * SIZE < most <= 3 * SIZE


def test_a_program_that_is_started_keeps_no_lock(server: WebServer, tmp_path: Path) -> None:
    tar = tars_of(server, 1)[0]
    cache = cache_of(tmp_path)
    content(cache, tar)
    cache.publish([tar], [])
    code = "import time; print(flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], close_fds=False, stdout=subprocess.PIPE)
    try:
        assert child.stdout and child.stdout.readline()
        os.close(cache._needs_file)  # as at the end of this process
        assert cache_of(tmp_path).needed_bytes() == 0
    finally:
        child.kill()
        child.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk(server: WebServer, tmp_path: Path) -> None:
    tars = tars_of(server, 5)
    (tmp_path / "cache").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path / "cache"], check=False).returncode:
        pytest.skip("this machine does not let tmpfs be mounted")
    try:
        said: list[str] = []
        cache = cache_of(tmp_path, said=said)
        assert content(cache, tars[0]) == source(server, tars[0])
        assert content(cache, tars[1]) == source(server, tars[1])
        assert not said
        assert content(cache, tars[2]) == source(server, tars[2])  # what nobody needs makes room
        assert not said
        cache.publish(tars[2:], [])
        cache.fetch(tars[3], 5.0)
        for tar in tars[3:]:
            content(cache, tar)
        assert content(cache, tars[4]) is None
        assert len(said) == 1 and "data.cache_dir" in said[0]
        assert len(files(tmp_path)) == 2
        os.close(cache._needs_file)
    finally:
        subprocess.run(["umount", "-l", tmp_path / "cache"], check=True)


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        cache_of(tmp_path)


def test_a_folder_cleared_under_its_users(server: WebServer, tmp_path: Path) -> None:
    tar = tars_of(server, 1)[0]
    cache = cache_of(tmp_path)
    content(cache, tar)
    subprocess.run(["rm", "-r", tmp_path / "cache"], check=True)
    assert content(cache, tar) == source(server, tar)


def test_what_is_needed_is_told_again_where_the_folder_was_cleared(server: WebServer, tmp_path: Path) -> None:
    one, other, (first, second) = cache_of(tmp_path), cache_of(tmp_path), tars_of(server, 2)
    assert not one.is_published()
    one.publish([first], [])
    assert one.is_published() and other.needed_bytes() == SIZE
    shutil.rmtree(tmp_path / "cache")
    assert not one.is_published() and other.needed_bytes() == 0
    one.publish([first], [second])
    assert one.is_published() and other.needed_bytes() == 2 * SIZE


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert Reading().cache_folder == Path("/elsewhere/seer/shards")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Reading().cache_folder == Path.home() / ".cache/seer/shards"


@pytest.mark.parametrize(
    "written",
    [b"", b"7", b"{}", b"[1, 2]", b"[{}, {}, {}]", b'[{"a": "1"}, {}]', b'[{"a": -1e9}, {}]', b"[" * 200_000, b"\xff"],
)
def test_needs_that_somebody_else_wrote(server: WebServer, tmp_path: Path, written: bytes) -> None:
    cache, (tar,) = cache_of(tmp_path, 1), tars_of(server, 1)
    with open(tmp_path / "cache" / "needs-other-1-x", "wb") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        theirs.write(written)
        theirs.flush()
        assert content(cache, tar) == source(server, tar)
        assert cache.needed_bytes() == 0
