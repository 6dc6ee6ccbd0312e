"""Batches from remote shards are those of the local ones, whatever the network and the cache do."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from remote_servers import GoogleServer, WebServer, google_server, s3_server, web_server
from tiny_run import make_shards

from seer import remote
from seer.data.crops import CropSpec
from seer.data.decode import open_image
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.shard_cache import ShardCache
from seer.data.stream import Batch, DataStream
from seer.errors import UserError
from seer.evaluation.features import labelled_crops
from seer.remote import Reading
from seer.shard_list import ShardList
from seer.shards.index import index
from seer.shards.stats import Shards, stats
from seer.shards.verify import verify

SECRET = "CANARY"
BATCHES = 5


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.02)


@pytest.fixture(autouse=True)
def _no_other_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "by_default"))
    yield
    assert not (tmp_path / "by_default").exists()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of 20 images with their indexes and a manifest."""
    folder = tmp_path_factory.mktemp("packed")
    make_shards(folder, each=40)
    return folder / "shards"


@pytest.fixture
def server(packed: Path) -> Iterator[WebServer]:
    with web_server(packed) as found:
        yield found


def names(packed: Path) -> list[str]:
    return sorted(path.name for path in packed.glob("*.tar"))


def pattern(packed: Path, place: str) -> str:
    """Braces that name every shard."""
    first, last = names(packed)[0], names(packed)[-1]
    number = first.rpartition("-")[2].partition(".")[0]
    return f"{place}/{first.removesuffix(f'{number}.tar')}{{{number}..{last.rpartition('-')[2].partition('.')[0]}}}.tar"


def reading(tmp_path: Path, gigabytes: float = 1.0, patience: float = 60.0) -> Reading:
    return Reading(str(tmp_path / "cache"), round(gigabytes * 1e9), patience)


def stream(shards: ShardList, *, workers: int = 0, **options: Any) -> DataStream:
    return DataStream(
        shards,
        seed=7,
        global_batch_size=8,
        crops=[CropSpec(2, 16, 0.3, 1.0)],
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        workers=workers,
        **options,
    )


def take(opened: DataStream, first: int = 0, count: int = BATCHES) -> list[Batch]:
    batches = []
    for batch in itertools.islice(opened.batches(first), count):
        batches.append(replace(batch, crops=[tensor.clone() for tensor in batch.crops]))
    opened.close()
    return batches


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.crops[0], b.crops[0]) and a.bad == b.bad for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(scope="module")
def local(packed: Path) -> list[Batch]:
    return take(stream(ShardList.open(f"{packed}/*.tar")))


@pytest.mark.parametrize(
    ("workers", "gigabytes"),
    [
        *((0, 1.0), (2, 1.0), (0, 0.0)),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((2, 0.0), (0, 60e-6), (2, 60e-6))),
    ],
)
def test_batches_from_a_web_server(
    packed: Path, server: WebServer, tmp_path: Path, local: list[Batch], workers: int, gigabytes: float
) -> None:
    """With room for all shards, without a cache, with room for less than two of them."""
    largest = max((packed / name).stat().st_size for name in names(packed))
    assert 2 * largest > 60_000
    shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path, gigabytes))
    assert shards.digest == ShardList.open(f"{packed}/*.tar").digest
    server.fault = lambda path, number: "503" if number == 1 else None
    assert same(take(stream(shards, workers=workers)), local)
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.shard")) if gigabytes else 0
    assert held <= gigabytes * 1e9
    if gigabytes == 1.0:
        asked = {name: server.requests.count(f"/{name}") for name in names(packed)}
        assert all(1 <= count <= 3 for count in asked.values()), asked  # once, but for the 503s


def test_a_look_fetches_the_shards_of_the_images_that_it_shows(
    packed: Path, server: WebServer, tmp_path: Path, local: list[Batch]
) -> None:
    shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path))
    batch, origins = stream(shards).look(3, 2)
    assert torch.equal(batch.crops[0], local[3].crops[0].unflatten(0, (2, 8))[:, :2].flatten(0, 1))
    shown = {origin.shard.rpartition("/")[2] for origin in origins}
    assert {name for name in names(packed) if f"/{name}" in server.requests} == shown and len(shown) < len(shards)
    assert {origin.name for origin in origins} <= {"class0", "class1", "class2"}


@pytest.mark.slow
def test_batches_from_s3(packed: Path, tmp_path: Path, local: list[Batch]) -> None:
    with s3_server() as endpoint:
        import boto3

        bucket = boto3.resource("s3", endpoint_url=endpoint).create_bucket(Bucket="shards")
        for file in packed.iterdir():
            bucket.put_object(Key=f"web/{file.name}", Body=file.read_bytes())
        shards = ShardList.open("s3://shards/web/*.tar", reading=reading(tmp_path))
        assert [shard.location for shard in shards.listed] == [f"s3://shards/web/{name}" for name in names(packed)]
        assert same(take(stream(shards)), local)
        # Some here, some there: only names count.
        first, *others = names(packed)
        mixed = [f"{packed}/{first}", *(f"s3://shards/web/{name}" for name in others)]
        assert same(take(stream(ShardList.open(mixed, reading=reading(tmp_path, 0)))), local)
        with pytest.raises(UserError, match=r"no shard matches s3://shards/none/\*\.tar"):
            ShardList.open("s3://shards/none/*.tar")


@pytest.fixture(scope="module")
def buckets(packed: Path) -> Iterator[GoogleServer]:
    """gs://shards/web: all files of `packed`; gs://bare/web: its tars alone."""
    with google_server() as found:
        for file in packed.iterdir():
            found.put(f"gs://shards/web/{file.name}", file.read_bytes())
            if file.suffix == ".tar":
                found.put(f"gs://bare/web/{file.name}", file.read_bytes())
        yield found


@pytest.fixture
def bucket(buckets: GoogleServer, monkeypatch: pytest.MonkeyPatch) -> GoogleServer:
    buckets.fault = lambda path, number: None
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", buckets.url)
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    return buckets


@pytest.mark.parametrize(
    ("workers", "gigabytes"),
    [(0, 1.0), pytest.param(2, 1.0, marks=pytest.mark.slow), (0, 0.0), pytest.param(2, 0.0, marks=pytest.mark.slow)],
)
def test_batches_from_google(
    packed: Path, bucket: GoogleServer, tmp_path: Path, local: list[Batch], workers: int, gigabytes: float
) -> None:
    """Of a server that answers 503 and cuts in between; with a cache each tar comes once."""
    shards = ShardList.open("gs://shards/web/*.tar", reading=reading(tmp_path, gigabytes))
    assert [shard.location for shard in shards.listed] == [f"gs://shards/web/{name}" for name in names(packed)]
    assert shards.digest == ShardList.open(f"{packed}/*.tar").digest
    bucket.fault = lambda path, number: {1: "503", 2: "cut"}.get(number)
    bucket.requests.clear()
    assert same(take(stream(shards, workers=workers)), local)
    if gigabytes:
        assert 1 <= max(bucket.requests.count(path) for path in set(bucket.requests)) <= 4


def test_indexes_of_a_bucket_in_a_local_folder(
    packed: Path, bucket: GoogleServer, tmp_path: Path, local: list[Batch]
) -> None:
    """What a user does with tars of somebody else: index, verify, stats, train."""
    indexes, tars = tmp_path / "indexes", "gs://bare/web/*.tar"
    command = [sys.executable, "-m", "seer", "shards", "index", tars, "--index-dir", str(indexes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in names(packed):
        assert (indexes / f"{name}.seer.npz").read_bytes() == (packed / f"{name}.seer.npz").read_bytes()
    assert verify([tars], indexes) == ([], len(names(packed)))
    seen = stats(Shards([tars], indexes), open_image, max_images=30)
    assert (seen.images, seen.sampled, seen.bad) == (120, 30, {})
    assert same(take(stream(ShardList.open(tars, indexes, reading(tmp_path)))), local)
    with pytest.raises(
        UserError, match=r"has no index .* --index-dir 'DIR' and name DIR .*data\.index_dir=DIR, .*--index-dir DIR"
    ):
        ShardList.open(tars)
    with pytest.raises(UserError, match=r"no shard matches gs://bare/none/\*\.tar"):
        ShardList.open("gs://bare/none/*.tar")
    damaged = bytearray((packed / names(packed)[1]).read_bytes())
    damaged[700] ^= 1  # of an image
    bucket.put(f"gs://bare/web/{names(packed)[1]}", bytes(damaged))
    (altered,), _ = verify([tars], indexes)
    assert f"gs://bare/web/{names(packed)[1]} is altered" in altered.problem
    bucket.fault = lambda path, number: "403" if path.endswith("o/web%2Fmanifest.json") else None
    assert ShardList.open("gs://shards/web/*.tar").digest == ShardList.open(f"{packed}/*.tar").digest


def test_windows_go_through_a_small_cache(tmp_path: Path) -> None:
    """Two ranks with room for what they need at a time: no image is read by itself, and a rank that runs ahead evicts
    nothing that the other one needs.
    """
    make_shards(tmp_path, each=80)
    packed = tmp_path / "shards"
    room = sum((packed / name).stat().st_size for name in names(packed)) * 10 / 12
    options: dict[str, Any] = {"lanes": 2, "window": 20, "world_size": 2}
    here = [take(stream(ShardList.open(f"{packed}/*.tar"), **options, rank=rank), count=70) for rank in range(2)]
    with web_server(packed) as server:
        shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path, room / 1e9))
        ranks = [stream(shards, **options, rank=rank) for rank in range(2)]
        running = [rank.batches(0) for rank in ranks]
        assert torch.equal(next(running[0]).crops[0], here[0][0].crops[0])
        briefing = ranks[0]._briefing
        assert briefing is not None
        needed = np.concatenate(briefing.order.windows(1, briefing.slots)).tolist()
        cached = ShardCache(shards.reading)
        files = [tmp_path / "cache" / f"{cached.name(shards.listed[number])}.shard" for number in needed]
        end = time.monotonic() + 60
        while not all(file.exists() for file in files) or not cached.needed_bytes():
            assert time.monotonic() < end
            time.sleep(0.02)
        before = [file.stat().st_ino for file in files]
        for number in range(70):  # over two epochs: all shards
            assert torch.equal(next(running[1]).crops[0], here[1][number].crops[0])
            held = sum(file.stat().st_size for file in (tmp_path / "cache").glob("*.shard"))
            assert held <= room
        assert [file.stat().st_ino for file in files] == before
        for rank in ranks:
            rank.close()
        assert set(server.starts) == {0}


def test_indexes_in_a_local_folder(
    packed: Path, tmp_path: Path, local: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tars of somebody who has no indexes: made here, with a list and without one."""
    bare, indexes, temporary = tmp_path / "bare", tmp_path / "indexes", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    bare.mkdir()
    for name in names(packed):
        shutil.copy(packed / name, bare)
    with web_server(bare) as server:
        tars = pattern(packed, server.url)
        with pytest.raises(
            UserError, match=r"has no index .* --index-dir 'DIR' and name DIR .*data\.index_dir=DIR, .*--index-dir DIR"
        ):
            ShardList.open(tars)
        with pytest.raises(UserError, match=r"/no\.tar does not exist"):
            ShardList.open(f"{server.url}/no.tar")
        with pytest.raises(UserError, match="--index-dir"):
            index([tars])
        server.requests.clear()
        for already in (0, len(names(packed))):  # the second call finds everything done
            assert index([tars], indexes).already_there == already
            assert sorted(server.requests) == [f"/{name}" for name in names(packed)]
        for name in names(packed):
            assert (indexes / f"{name}.seer.npz").read_bytes() == (packed / f"{name}.seer.npz").read_bytes()
        assert same(take(stream(ShardList.open(tars, indexes, reading(tmp_path)))), local)
        (indexes / "manifest.json").unlink()
        assert ShardList.open(tars, indexes).digest == ShardList.open(f"{packed}/*.tar").digest
        assert verify([tars], indexes) == ([], len(names(packed)))
        seen = stats(Shards([tars], indexes), open_image, max_images=30)
        assert (seen.images, seen.sampled, seen.bad) == (120, 30, {})
        damaged = bytearray((bare / names(packed)[1]).read_bytes())
        damaged[700] ^= 1  # of an image
        (bare / names(packed)[1]).write_bytes(damaged)
        (bare / names(packed)[2]).write_bytes(damaged[: len(damaged) // 2])
        (altered, cut), _ = verify([tars], indexes)
        assert f"{server.url}/{names(packed)[1]} is altered" in altered.problem
        assert f"{server.url}/{names(packed)[2]} is damaged at byte" in cut.problem
    assert not list(temporary.iterdir())


def test_a_stale_index_stops_the_run(packed: Path, server: WebServer, tmp_path: Path) -> None:
    """Bytes changed under an index are neither substituted nor learnt from."""
    shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path))
    server.fault = lambda path, number: "flip" if path.endswith("1.tar") else None
    with pytest.raises(UserError, match=r"1\.tar holds other bytes than its index says: the index is stale"):
        take(stream(shards))


@pytest.mark.parametrize("gigabytes", [1.0, pytest.param(0.0, marks=pytest.mark.slow)])
def test_a_server_that_is_gone_stops_the_run_with_the_address(
    packed: Path, server: WebServer, tmp_path: Path, gigabytes: float
) -> None:
    shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path, gigabytes, patience=1.0))
    server.fault = lambda path, number: "503"
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"{server.url}.*\.tar.* cannot be read .*503"):
        take(stream(shards, workers=1))
    assert time.monotonic() - start < 60


def test_the_fetcher_comes_before_the_workers_and_is_replaced(
    packed: Path, server: WebServer, tmp_path: Path, local: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seer.data.fetching._RESTART_SECONDS", 0.0)
    shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path))
    opened = stream(shards)
    batches = opened.batches(0)
    next(batches)
    assert opened._fetcher is not None
    died = opened._fetcher.pid
    os.kill(died, signal.SIGKILL)
    opened._fetcher._process.wait()
    made = [next(batches) for _ in range(2)]
    assert opened._fetcher.pid != died
    end = time.monotonic() + 60
    while len(list((tmp_path / "cache").glob("*.shard"))) < len(names(packed)):  # all are needed in this epoch
        assert time.monotonic() < end
        time.sleep(0.02)
    assert torch.equal(made[1].crops[0], local[2].crops[0])
    while not list((tmp_path / "cache").glob(f"needs-*-{opened._fetcher.pid}-*")):
        assert time.monotonic() < end
        time.sleep(0.02)
    opened.close()


@pytest.mark.slow
def test_too_little_room_is_told_once(
    packed: Path, server: WebServer, tmp_path: Path, local: list[Batch], capfd: pytest.CaptureFixture[str]
) -> None:
    shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path, 60e-6))
    opened = stream(shards)
    batches = opened.batches(0)
    said, end = "", time.monotonic() + 60
    while "data.cache_gb" not in said:
        next(batches)
        said += capfd.readouterr().err
        assert time.monotonic() < end
    for _ in range(5):
        next(batches)
    opened.close()
    said += capfd.readouterr().err
    assert said.count("data.cache_gb=6e-05") == 1 and "read one by one" in said


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_changes_no_batch(
    packed: Path, server: WebServer, tmp_path: Path, local: list[Batch], capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", cache], check=False).returncode:
        pytest.skip("this machine does not let tmpfs be mounted")
    try:
        shards = ShardList.open(pattern(packed, server.url), reading=reading(tmp_path))
        assert same(take(stream(shards)), local)
        opened = stream(shards)
        batches, said, end = opened.batches(0), "", time.monotonic() + 60
        while "the disk is full" not in said:
            next(batches)
            said += capfd.readouterr().err
            assert time.monotonic() < end
        opened.close()
        assert "data.cache_dir" in said
    finally:
        subprocess.run(["umount", "-l", cache], check=True)


def test_evaluation_reads_remote_shards(packed: Path, server: WebServer, tmp_path: Path) -> None:
    def crops(shards: ShardList) -> str:
        digest = hashlib.sha256()
        for batch in labelled_crops(shards, image_size=16, batch_size=32, max_images=60):
            digest.update(np.ascontiguousarray(batch.crops.numpy()).tobytes() + batch.labels.numpy().tobytes())
        return digest.hexdigest()

    here = crops(ShardList.open(f"{packed}/*.tar"))
    assert crops(ShardList.open(pattern(packed, server.url), reading=reading(tmp_path))) == here


@pytest.mark.slow
def test_a_run_stops_when_its_server_is_gone_and_goes_on_when_it_is_back(
    packed: Path, server: WebServer, tmp_path: Path
) -> None:
    """A command as users give it, with a password and a signature that must stand nowhere."""
    run = tmp_path / "run"
    url = f"{pattern(packed, server.url)}?signature={SECRET}".replace("://", f"://user:{SECRET}@")
    overrides = [
        *("experiment=demo", f"run_dir={run}", f"data.shards={url}", "data.workers=1", f"data.cache_dir={tmp_path}/c"),
        *("data.cache_gb=0", "data.io_timeout_seconds=1", "data.large.size=32", "data.small.size=24"),
        *("data.small.count=1", "objective.prototypes=8", "train.steps=6", "train.global_batch_size=8"),
        *("train.threads=1", "train.log_every_steps=1", "checkpoint.every_steps=1", "evaluation.every_steps=0"),
        *("evaluation.train=[]", "evaluation.val=[]", "objective.freeze_prototypes_steps=0", "train.precision=fp32"),
    ]
    command = [sys.executable, "-m", "seer", "train", *overrides]
    # Three batches and what workers make ahead of them.
    server.fault = lambda path, number: "503" if sum(one.endswith(".tar") for one in server.requests) > 28 else None
    stopped = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert stopped.returncode == 2, stopped.stderr
    assert "cannot be read (the server answers 503)" in stopped.stderr and server.url in stopped.stderr
    assert list((run / "checkpoints").iterdir())
    server.fault = lambda path, number: None
    ended = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr
    assert "going on from step" in ended.stdout
    told = stopped.stdout + stopped.stderr + ended.stdout + ended.stderr
    written = b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    assert SECRET not in told and SECRET.encode() not in written
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["config"]["data"]["shards"] == [f"{pattern(packed, server.url)}?(redacted)"]
    refused = subprocess.run(
        [sys.executable, "-m", "seer", "launch", *overrides, "--dry-run"], capture_output=True, text=True, timeout=150
    )
    assert refused.returncode == 2 and "seer launch writes" in refused.stderr and SECRET not in refused.stderr
