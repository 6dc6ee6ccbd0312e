"""How fast are checkpoints saved and loaded, beside what the disk takes and gives?

    python benchmarks/bench_checkpoint.py --folder /scratch --out checkpoint.json      # 500 MB on the disk of /scratch
    python benchmarks/bench_checkpoint.py --ranks 2 --megabytes 2000
    python benchmarks/bench_checkpoint.py --quick                                      # does it run at all

A synthetic state like a run's: most bytes in tensors of some megabytes (sharded where there are two ranks), and
hundreds of small ones (equal on all ranks). Saving is `CheckpointStore.save` with all that a step waits for: writing,
hashing, fsync, publication, removal of an older one. Loading is `newest`, which hashes every byte, and `load_into`. The
alternative is dd of as many bytes on the same disk: writing with conv=fsync, and reading. Before anything is read, its
pages are dropped from the cache where the system can do it.

Saves and loads of both sides take turns in each round, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from seer.checkpoint.store import CheckpointStore
from seer.distributed import mesh, world_size
from seer.files import write_atomically

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from ranks import ranks

MB = 10**6
LARGE_MB, SMALL_TENSORS, SMALL_ELEMENTS = 4, 400, 1000
CAN_DROP = hasattr(os, "posix_fadvise")

_STATE: dict[str, Tensor] = {}
"""What a rank saves; made once."""


# --- on each rank ---


def make_state(megabytes: int) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    over = mesh(torch.device("cpu")) if world_size() > 1 else None
    for number in range(max(megabytes // LARGE_MB, 1)):
        whole = torch.rand(LARGE_MB * MB // 4000, 1000, generator=generator)
        _STATE[f"large-{number}"] = whole if over is None else distribute_tensor(whole, over, [Shard(0)])
    for number in range(SMALL_TENSORS):
        _STATE[f"small-{number}"] = torch.rand(SMALL_ELEMENTS, generator=generator)


def save(folder: Path, step: int) -> float:
    """Seconds that the step waits."""
    start = time.perf_counter()
    CheckpointStore(folder).save(step, _STATE, {"step": step})
    return time.perf_counter() - start


def load(folder: Path) -> tuple[float, float]:
    """Seconds of verification, and of reading into the tensors."""
    start = time.perf_counter()
    found = CheckpointStore(folder).newest()
    assert found is not None
    verified = time.perf_counter()
    found.load_into(_STATE)
    return verified - start, time.perf_counter() - verified


# --- measuring ---


def dd(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run(["dd", "bs=1M", *words], check=True, capture_output=True)
    return time.perf_counter() - start


def drop_pages(files: list[Path]) -> None:
    """So that reading them reaches the disk; they must have been flushed to it."""
    if CAN_DROP:
        for file in files:
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, megabytes: int, rounds: int, number_of_ranks: int) -> dict[str, Any]:
    """Bytes of a checkpoint, and seconds of each operation in each round."""
    pool, checkpoints, plain = ranks(number_of_ranks), folder / "checkpoints", folder / "dd"
    pool.run(make_state, megabytes, timeout=600.0)
    pool.run(save, checkpoints, 0, timeout=600.0)  # the first of a process sets up more than the later ones
    size = sum(file.stat().st_size for file in (checkpoints / "step-00000000").iterdir())
    blocks = max(round(size / 2**20), 1)
    seconds: dict[str, list[float]] = {name: [] for name in ("dd_write", "save", "dd_read", "verify", "load_into")}

    def write_by_dd() -> None:
        seconds["dd_write"].append(dd("if=/dev/zero", f"of={plain}", f"count={blocks}", "conv=fsync"))

    def write_by_us() -> None:
        seconds["save"].append(max(pool.run(save, checkpoints, number, timeout=600.0)))

    def read_by_dd() -> None:
        drop_pages([plain])
        seconds["dd_read"].append(dd(f"if={plain}", "of=/dev/null"))

    def read_by_us() -> None:
        drop_pages(list((checkpoints / f"step-{number:08d}").iterdir()))
        verify, load_into = zip(*pool.run(load, checkpoints, timeout=600.0), strict=True)
        seconds["verify"].append(max(verify))
        seconds["load_into"].append(max(load_into))

    for number in range(1, rounds + 1):
        for ours_and_dd in ([write_by_us, write_by_dd], [read_by_us, read_by_dd]):
            for action in ours_and_dd if number % 2 else reversed(ours_and_dd):
                action()
    return {"bytes": size, "dd_bytes": blocks * 2**20, "seconds": seconds}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Median throughputs in MB/s, and ours over dd's as the median of the rounds' ratios."""
    seconds = found["seconds"]
    rates = {
        "save": [found["bytes"] / MB / taken for taken in seconds["save"]],
        "dd_write": [found["dd_bytes"] / MB / taken for taken in seconds["dd_write"]],
        "load": [
            found["bytes"] / MB / (verify + read)
            for verify, read in zip(seconds["verify"], seconds["load_into"], strict=True)
        ],
        "dd_read": [found["dd_bytes"] / MB / taken for taken in seconds["dd_read"]],
    }
    told = {f"{name}_mb_per_s": round(statistics.median(values), 1) for name, values in rates.items()}
    for ours, alternative in (("save", "dd_write"), ("load", "dd_read")):
        ratios = [own / other for own, other in zip(rates[ours], rates[alternative], strict=True)]
        told[f"{ours}_ratio"] = round(statistics.median(ratios), 3)
    return told | {
        "megabytes": round(found["bytes"] / MB, 1),
        "stall_seconds": round(statistics.median(seconds["save"]), 3),
        "verify_seconds": round(statistics.median(seconds["verify"]), 3),
        "load_into_seconds": round(statistics.median(seconds["load_into"]), 3),
        "reads_from": "disk" if CAN_DROP else "cache",
    }


# --- telling ---


def table(told: dict[str, Any], title: str) -> Table:
    shown = Table(title=title)
    shown.add_column("")
    for heading in ("ours, MB/s", "dd, MB/s", "ratio", "seconds"):
        shown.add_column(heading, justify="right")
    reading = told["verify_seconds"] + told["load_into_seconds"]
    rows = (
        ("save: the step waits", "save", "dd_write", told["stall_seconds"]),
        (f"verify and load (from {told['reads_from']})", "load", "dd_read", reading),
    )
    for label, ours, alternative, taken in rows:
        figures = (told[f"{ours}_mb_per_s"], told[f"{alternative}_mb_per_s"])
        shown.add_row(label, *(f"{figure:.0f}" for figure in figures), f"{told[f'{ours}_ratio']:.2f}", f"{taken:.2f}")
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure (default: here)")
    parser.add_argument("--megabytes", type=int, default=500, help="of the state (default 500)")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=1, help="processes (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="saves and loads of each side (default 7)")
    parser.add_argument("--quick", action="store_true", help="8 MB, two rounds: it runs, the times mean little")
    parser.add_argument("--out", type=Path, help="write everything that was measured as JSON")
    given = parser.parse_args()
    if given.quick:
        given.megabytes, given.rounds = 8, 2
    return given


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory(dir=given.folder, prefix="bench-checkpoint-") as folder:
        found = measure(Path(folder).resolve(), given.megabytes, given.rounds, given.ranks)
    told = summary(found)
    title = f"{told['megabytes']:.0f} MB, {given.ranks} rank(s), medians of {given.rounds} rounds"
    Console().print(table(told, title))
    if given.out:
        run = {"command": sys.argv, "date": date.today().isoformat(), "machine": machine(), "ranks": given.ranks}
        everything = run | {"rounds": given.rounds, **found, "summary": told}
        write_atomically(given.out, (json.dumps(everything, indent=2) + "\n").encode())
    print(json.dumps(told))


if __name__ == "__main__":
    main()
