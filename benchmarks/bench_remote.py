"""How fast are images read from a server that takes its time, and how long does a fresh machine wait for a batch?

    python benchmarks/bench_remote.py --images DIR --out remote.json

A web server of its own, in a process of its own, waits before the first byte of every answer (``--latencies``, ms).
DIR holds JPEGs, best photographs of 500x375; each becomes 2x224 + 4x96 crops. Rounds are interleaved, wall-clock time.

``plain``: what anybody would write, in the same round: one request after another over one connection that is kept
(http.client), and the crops of each batch made as ours are. ``files``: local shards, ``cache``: shards of the server
that are in the cache, ``ranges``: data.cache_gb=0, each image a request. ``0``, ``2``: data workers.

Then the cold start (``--cold-shards 0`` leaves it out): so many shards of ``--cold-megabytes``, none of them here, all
in one window, from a server that gives ``--cold-rate`` MB a second in all, with the first of the latencies that is not
0: seconds to batches, through the cache until all shards are here and by ranges alone, and what the server had sent by
then over the bytes of the shards.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_pool import CROPS
from machine import machine

from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import DataStream
from seer.remote import Reading
from seer.shard_index import load_index, save_index
from seer.shard_list import ShardList
from seer.shard_manifest import entry, write
from seer.shards.pack import pack

WORKERS = (0, 2)
PIECE = 1 << 16
SOON, LATER = 1, 20  # batches after which a cold start is looked at

# ---- the server ----


class State:
    """What all connections share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.latency = self.rate = 0.0  # seconds; bytes a second, 0: any
        self.requests = self.sent = 0
        self.free_at = 0.0

    def pace(self, count: int) -> None:
        """Waits until so many bytes may be sent."""
        with self.lock:
            self.sent += count
            if not self.rate:
                return
            self.free_at = max(self.free_at, time.monotonic()) + count / self.rate
            wait = self.free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


def serve(folder: Path) -> None:
    """Prints its port, then answers for ever."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(listening.getsockname()[1], flush=True)
    state = State()
    while True:
        connection, _ = listening.accept()
        threading.Thread(target=converse, args=(connection, folder, state), daemon=True).start()


def converse(connection: socket.socket, folder: Path, state: State) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, connection.makefile("rb") as lines:
        try:
            while (asked := lines.readline()).strip():
                head = b"".join(iter(lines.readline, b"\r\n"))
                answer(connection, asked.split()[1].decode(), head, folder, state)
        except OSError:
            pass  # a client that is gone


def answer(connection: socket.socket, path: str, head: bytes, folder: Path, state: State) -> None:
    if path.startswith("/-/"):  # how it is set, and what it has seen so far
        latency, rate = map(float, path.split("/")[2:4])
        with state.lock:
            body = json.dumps([state.requests, state.sent]).encode()
            state.latency, state.rate, state.requests, state.sent = latency, rate, 0, 0
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return
    with state.lock:
        state.requests += 1
    time.sleep(state.latency)
    try:
        file = open(folder / path.lstrip("/"), "rb")  # noqa: SIM115
    except FileNotFoundError:
        connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        return
    with file:
        size = os.fstat(file.fileno()).st_size
        wanted = re.search(rb"(?i)\nrange: *bytes=(\d+)-(\d*)", b"\n" + head)
        first, last = (int(wanted[1]), min(int(wanted[2] or size), size - 1)) if wanted else (0, size - 1)
        words = b"206 Partial Content" if wanted else b"200 OK"
        where = b"Content-Range: bytes %d-%d/%d\r\n" % (first, last, size) if wanted else b""
        length = last + 1 - first
        connection.sendall(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n%b\r\n" % (words, length, where))
        while first <= last:
            count = min(PIECE, last + 1 - first)
            state.pace(count)
            first += os.sendfile(connection.fileno(), file.fileno(), first, count)


class Server:
    """The server as its client sees it."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, "--serve", folder], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def set(self, latency_ms: float, megabytes: float = 0.0) -> tuple[int, int]:
        """From now on; gives the requests and the bytes sent since it was set last."""
        with urllib.request.urlopen(f"{self.url}/-/{latency_ms / 1000}/{megabytes * 1e6}") as found:
            requests, sent = json.load(found)
        return requests, sent

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


# ---- what is measured ----


def stream(shards: ShardList, batch: int, workers: int) -> DataStream:
    return DataStream(
        shards,
        seed=0,
        global_batch_size=batch,
        crops=CROPS,
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        workers=workers,
    )


def remote_list(server: Server, folder: Path, reading: Reading) -> ShardList:
    return ShardList.open([f"{server.url}/{tar.name}" for tar in sorted(folder.glob("*.tar"))], reading=reading)


@contextmanager
def running(opened: DataStream) -> Iterator[Callable[[], object]]:
    batches = opened.batches(0)
    try:
        yield lambda: next(batches)
    finally:
        opened.close()


def rate_of(make: Callable[[], object], batches: int, images: int) -> float:
    """Images a second, after the first batch: what is started and touched first."""
    make()
    start = time.perf_counter()
    for _ in range(batches):
        make()
    return batches * images / (time.perf_counter() - start)


def plain(server: Server, here: ShardList, batch: int, batches: int) -> float:
    connection, number = http.client.HTTPConnection("127.0.0.1", server.port), 0

    def read() -> None:
        nonlocal number
        for _ in range(batch):
            number += 1
            index = here[number % len(here)]
            sample = number // len(here) % len(index)
            first, size = int(index.offsets[sample]), int(index.sizes[sample])
            connection.request("GET", f"/{index.name}", headers={"Range": f"bytes={first}-{first + size - 1}"})
            assert len(connection.getresponse().read()) == size

    with running(stream(here, batch, 0)) as make:
        found = rate_of(lambda: (read(), make()), batches, batch)
    connection.close()
    return found


def one_round(
    server: Server, folder: Path, cache: Path, latencies: list[float], batch: int, batches: int
) -> dict[str, float]:
    here = ShardList.open(str(folder / "*.tar"))
    cached, apart = (remote_list(server, folder, Reading(str(cache), room)) for room in (10**12, 0))
    found = {}
    for workers in WORKERS:
        with running(stream(here, batch, workers)) as make:
            found[f"files {workers}"] = rate_of(make, batches, batch)
    for latency in latencies:
        server.set(latency)
        # Where a batch takes seconds, fewer of them tell as much.
        found[f"plain {latency:g} ms"] = plain(server, here, batch, max(1, batches // 4))
        for kind, shards in (("cache", cached), ("ranges", apart)):
            for workers in WORKERS:
                with running(stream(shards, batch, workers)) as make:
                    found[f"{kind} {workers} {latency:g} ms"] = rate_of(make, batches, batch)
    server.set(0)
    return found


def cold_start(
    server: Server, folder: Path, reading: Reading, latency: float, rate: float, batch: int
) -> dict[str, float]:
    server.set(latency, rate)
    start, found = time.perf_counter(), {}
    shards = remote_list(server, folder, reading)
    total = sum(shard.tar_size for shard in shards.listed)
    with running(stream(shards, batch, max(WORKERS))) as make:
        for number in range(1, LATER + 1):
            make()
            if number in (SOON, LATER):
                found[f"seconds_to_batch_{number}"] = time.perf_counter() - start
        while reading.cache_bytes and len(list(reading.cache_folder.glob("*.shard"))) < len(shards):
            time.sleep(0.05)
        found["seconds"] = time.perf_counter() - start
        requests, sent = server.set(0)
    return found | {"requests": requests, "sent_ratio": sent / total, "megabytes": total / 1e6}


def cold_shards(packed: Path, folder: Path, count: int) -> None:
    """So many names for the same few shards."""
    tars, entries = sorted(packed.glob("*.tar")), []
    for number in range(count):
        copy = folder / f"cold-{number:04d}.tar"
        os.link(tars[number % len(tars)], copy)
        index = load_index(tars[number % len(tars)])
        save_index(index, Path(f"{copy}.seer.npz"))
        entries.append(entry(index, copy.name))
    write(folder, entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--latencies", type=float, nargs="+", default=[0.0, 20.0, 50.0], help="ms")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=12, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-shards", type=int, default=64)
    parser.add_argument("--cold-megabytes", type=float, default=20.0)
    parser.add_argument("--cold-rate", type=float, default=100.0, help="MB a second")
    parser.add_argument("--folder", type=Path, help="for shards and cache; default: a temporary one")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        rounds = warm(given, folder)
        cold = cold_of(given, folder)
    summary = report(given, rounds, cold)
    if given.out:
        about = {"machine": machine("pillow", "aiohttp"), "summary": summary, "rounds": rounds, "cold": cold}
        given.out.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(summary))


def warm(given: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    pack(given.images, folder / "shards", shard_bytes=4_000_000, workers=1)
    server = Server(folder / "shards")
    try:
        arguments = (server, folder / "shards", folder / "cache", given.latencies, given.batch, given.batches)
        return [one_round(*arguments) for _ in range(given.rounds)]
    finally:
        server.close()


def cold_of(given: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    if not given.cold_shards:
        return {}
    pack(given.images, folder / "packed", shard_bytes=int(given.cold_megabytes * 1e6), workers=1)
    (folder / "cold").mkdir()
    cold_shards(folder / "packed", folder / "cold", given.cold_shards)
    shutil.rmtree(folder / "packed")
    latency = next((one for one in given.latencies if one), 0.0)
    server = Server(folder / "cold")
    try:
        return {
            kind: cold_start(
                server, folder / "cold", Reading(str(folder / "fresh"), room), latency, given.cold_rate, given.batch
            )
            for kind, room in (("cache", 10**12), ("ranges", 0))
        }
    finally:
        server.close()


def report(
    given: argparse.Namespace, rounds: list[dict[str, float]], cold: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Prints the tables; what the last line says."""
    speed = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    print(f"batches of {given.batch}, medians of {given.rounds} rounds, images/s (ratio to plain)")
    columns = [f"{kind} {workers}" for kind in ("files", "cache", "ranges") for workers in WORKERS]
    print(f"{'latency':10}{'plain':>8}" + "".join(f"{column:>16}" for column in columns))
    ratios: dict[str, float] = {}
    for latency in given.latencies:
        base, row = speed[f"plain {latency:g} ms"], ""
        for column in columns:
            rate = speed[column if column in speed else f"{column} {latency:g} ms"]
            ratios[f"{column.replace(' ', '_')}_{latency:g}ms"] = round(rate / base, 2)
            row += f"{rate:9.0f} ({rate / base:4.1f})"
        print(f"{f'{latency:g} ms':10}{base:8.0f}{row}")
    if cold:
        print(
            f"\ncold start: {given.cold_shards} shards, {cold['cache']['megabytes']:.0f} MB at {given.cold_rate:g} MB/s"
        )
        print(f"{'':20}" + "".join(f"{kind:>10}" for kind in cold))
        for name in cold["cache"]:
            print(f"{name:20}" + "".join(f"{row[name]:10.2f}" for row in cold.values()))
    rounded = {kind: {name: round(value, 2) for name, value in row.items()} for kind, row in cold.items()}
    return {"ratios": ratios, "cold": rounded}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        main()
