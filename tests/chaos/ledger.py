"""A ledger of what a run consumes: which sample stood in which slot of which batch, and digests of what it became.

    python ledger.py      # a nursery: imports torch once, then forks the ranks of each life that it is asked for

What is consumed is written by a wrapper around the loop's `train_step`, in the ranks of a real `loop.run`. Which image
a slot holds is told twice: by the order of the stream, and by the image itself, whose red and green say its number.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_shards import png, shard
from lives import PATIENCE, descendants, gone, kill
from numpy.typing import NDArray

from seer.shard_index import index_path, save_index

Sample = tuple[str, int]  # name of the tar, place in it


def numbered_image(number: int, size: int = 28) -> bytes:
    """A PNG whose red and green are one value each that says its number, below 1,024; its blue tells places apart."""
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 + 8 * (number // 32), 4 + 8 * (number % 32)
    pixels[..., 2] = np.add.outer(5 * np.arange(size), 4 * np.arange(size))
    return png(pixels)


def number_of(crop_HWC: NDArray[np.uint8]) -> int:
    """The number of the image that a crop was cut from."""
    red, green = crop_HWC[..., 0].astype(int), crop_HWC[..., 1].astype(int)
    assert np.ptp(red) <= 2 and np.ptp(green) <= 2, "resizing moves one value by rounding alone"
    return int(red[0, 0] // 8 * 32 + green[0, 0] // 8)


@dataclass
class NumberedShards:
    """Indexed tars of numbered images, some of them damaged.

    Attributes:
        pattern: of the tars.
        counts: images of each tar, in order.
        numbers: what each sample's image says.
        damaged: samples that cannot be decoded.
    """

    pattern: str
    counts: dict[str, int]
    numbers: dict[Sample, int]
    damaged: set[Sample]

    @classmethod
    def make(cls, folder: Path, name: str, counts: Sequence[int], damaged: set[tuple[int, int]]) -> NumberedShards:
        """Tars NAME-0.tar and so on; `damaged` are (number of the tar, place)."""
        folder.mkdir(parents=True)
        made = cls(str(folder / f"{name}-*.tar"), {}, {}, set())
        for place, count in enumerate(counts):
            tar, samples = f"{name}-{place}.tar", []
            for sample in range(count):
                made.numbers[tar, sample] = len(made.numbers)
                image = numbered_image(made.numbers[tar, sample])
                if (place, sample) in damaged:
                    made.damaged.add((tar, sample))
                    image = image[: len(image) // 2] if sample % 2 else b"<html>not found</html>"
                samples.append((image, -1))
            made.counts[tar] = count
            index = shard(folder / tar, samples)
            save_index(index, index_path(folder / tar))
        return made

    def stands_in(self, sample: Sample) -> Sample:
        """What docs/data.md says is seen where a sample should be, in a few words of another hand than the product's:
        itself, else one of the next 8 of its tar, else one of the first of the tars that follow."""
        tars = [tar for tar, count in self.counts.items() if count or tar == sample[0]]
        own = tars.index(sample[0])
        tries = [(sample[0], (sample[1] + step) % self.counts[sample[0]]) for step in range(9)]
        for tar in tars[own + 1 :] + tars[:own]:
            tries += [(tar, place) for place in range(min(8, self.counts[tar]))]
        return next(candidate for candidate in tries if candidate not in self.damaged)


@dataclass
class Row:
    """A slot of a batch as a rank consumed it."""

    batch: int
    sample: Sample
    number: int
    crops: str
    photometric: str


@dataclass
class LifeLedger:
    """What a life consumed.

    Attributes:
        ranks: of the life.
        steps: by rank: the steps in the sequence in which they were taken.
        rows: by (step, slot).
    """

    ranks: int
    steps: list[list[int]]
    rows: dict[tuple[int, int], Row]


def read_life(prefix: Path, ranks: int) -> LifeLedger:
    """The ledgers of all ranks of a life; a line that a kill has torn does not count."""
    ledger = LifeLedger(ranks, [[] for _ in range(ranks)], {})
    for rank in range(ranks):
        file = prefix.with_name(f"{prefix.name}-rank-{rank}.jsonl")
        for raw in file.read_bytes().split(b"\n")[:-1] if file.exists() else []:
            line = json.loads(raw)
            ledger.steps[rank].append(line["step"])
            for slot, sample, *rest in line["slots"]:
                assert (line["step"], slot) not in ledger.rows, "a slot belongs to one rank, and a life goes forward"
                ledger.rows[line["step"], slot] = Row(line["batch"], (sample[0], sample[1]), *rest)
    return ledger


class Nursery:
    """A process that has imported torch and forks the ranks of one life after another."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def close(self) -> None:
        """Ends it; ranks die with it."""
        self._process.kill()
        self._process.communicate()

    def start(self, words: Sequence[str], prefix: Path, ranks: int) -> list[int]:
        """Begins a life; the process ids of its ranks."""
        assert self._process.stdin is not None
        job = {"words": list(words), "prefix": str(prefix), "ranks": ranks}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        pids: list[int] = self._answer()
        return pids

    def end(self) -> list[int]:
        """Waits for all ranks of the life; how they ended."""
        codes: list[int] = self._answer()
        return codes

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def kill_life(pids: Sequence[int]) -> None:
    """SIGKILL to all of it at once; then nothing of it is left."""
    everybody = [*pids, *(below for pid in pids for below in descendants(pid))]
    for pid in pids:
        kill(pid, signal.SIGKILL)
    assert gone(everybody)


def wait_for_steps(prefix: Path, ranks: int, steps: int, pids: Sequence[int]) -> None:
    """Until a rank has taken so many steps in this life."""
    files = [prefix.with_name(f"{prefix.name}-rank-{rank}.jsonl") for rank in range(ranks)]
    deadline = time.monotonic() + PATIENCE
    while not any(file.exists() and file.read_bytes().count(b"\n") >= steps for file in files):
        assert time.monotonic() < deadline and not gone_already(pids), prefix.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.002)


def gone_already(pids: Sequence[int]) -> bool:
    return not all(Path(f"/proc/{pid}").exists() for pid in pids)


# What runs in the nursery and in the ranks.


def _digest(*parts: NDArray[Any]) -> str:
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        state.update(np.ascontiguousarray(part).tobytes())
    return state.hexdigest()


def _slots(stream: Any, batch: Any, rank: int, ranks: int) -> list[list[Any]]:
    """A line's entries: slot, sample by the order, number in the pixels, digests of crops and of their parameters."""
    assembler = stream._assembler
    images = assembler.images
    slots = np.arange(rank * images, (rank + 1) * images)
    shards, samples = assembler._order.positions(batch.batch_index, slots)
    crops = [pixels.numpy().reshape(-1, images, *pixels.shape[1:]) for pixels in batch.crops]
    parameters = [rows.numpy().reshape(-1, images, rows.shape[-1]) for rows in batch.photometric]
    entries = []
    for row, slot in enumerate(slots.tolist()):
        own = [part[:, row] for part in crops]
        numbers = {number_of(crop) for part in own for crop in part}
        assert len(numbers) == 1, "all crops of a slot are cut from one image"
        name = Path(assembler.shard_path(int(shards[row]))).name
        told = [name, int(samples[row])]
        entries.append([slot, told, *numbers, _digest(*own), _digest(*(part[:, row] for part in parameters))])
    return entries


def recorded(prefix: Path, rank: int, ranks: int) -> None:
    """Wraps what the loop calls: each step is written before it is taken."""
    from seer.data.stream import DataStream
    from seer.training import loop

    batches, step, held = DataStream.batches, loop.train_step, []
    file = os.open(prefix.with_name(f"{prefix.name}-rank-{rank}.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watched(stream: DataStream, batch_index: int) -> Iterator[Any]:
        running = batches(stream, batch_index)  # now, as the loop would

        def handed_on() -> Iterator[Any]:
            for batch in running:
                held[:] = [stream, batch]
                yield batch

        return handed_on()

    def taken(state: Any, *args: Any, **more: Any) -> Any:
        stream, batch = held
        line = {"step": state.step, "batch": batch.batch_index, "slots": _slots(stream, batch, rank, ranks)}
        os.write(file, json.dumps(line).encode() + b"\n")
        return step(state, *args, **more)

    DataStream.batches, loop.train_step = watched, taken  # type: ignore[method-assign]


def _rank(config: Any, prefix: Path, rank: int, ranks: int, port: int) -> int:
    from seer.training import loop

    log = os.open(prefix.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:
        os.environ |= {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
    recorded(prefix, rank, ranks)
    return loop.run(config).exit_code


def _forked(work: Callable[[], int]) -> int:
    parent = os.getpid()
    if (pid := os.fork()) == 0:
        code = 1
        try:
            _die_with(parent)
            code = work()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _nursery(parent: int) -> None:
    _die_with(parent)
    # What a rank would import, most of it in the middle of its work: once for all of them.
    import torch
    import torch._dynamo
    import torch.utils.tensorboard
    from PIL import Image

    from seer.compose import compose
    from seer.training import loop  # noqa: F401

    Image.init()
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork beside threads may hang"
    for line in iter(sys.stdin.buffer.readline, b""):
        job, port = json.loads(line), _free_port()
        config = compose(job["words"])
        work = [partial(_rank, config, Path(job["prefix"]), rank, job["ranks"], port) for rank in range(job["ranks"])]
        pids = [_forked(one) for one in work]
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)


if __name__ == "__main__":
    _nursery(int(sys.argv[1]))
