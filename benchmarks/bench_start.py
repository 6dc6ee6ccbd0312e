"""How long does a run take to its first step, with a million images in its shards? Beside the same with a thousand.

    python benchmarks/bench_start.py --folder DISK --out start.json    # 3 GB; with --files 8 GB and a million inodes

Tiny JPEG images (32 pixels, about 1 kB) are written into tars of 10,000, which `seer shards index` then indexes.
``first_step_seconds``: from the start of `seer train experiment=demo` (the tiny network) to the line of its first step
in metrics.jsonl, the median of rounds in turn with a thousand images (``small_seconds``); aim 20 at most.
``first_step_cpu_seconds`` and ``small_cpu_seconds`` are of the process alone, whatever else the machine does. With
--files the same images lie in one folder as files too: ``pack_seconds`` is what `seer shards pack` takes,
``listed_seconds`` what it takes until it begins to write.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import machine
from PIL import Image

from seer.shards.tar_writing import TarWriter

_A_TAR, _DIFFERENT = 10_000, 1_000
_RUN = (
    *("experiment=demo", "train.steps=1", "train.log_every_steps=1", "evaluation.every_steps=0"),
    *("evaluation.train=[]", "evaluation.val=[]"),
)


def pictures() -> list[bytes]:
    """Noise of 32 pixels as JPEG."""
    rng, found = np.random.default_rng(0), []
    for _ in range(_DIFFERENT):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "JPEG")
        found.append(buffer.getvalue())
    return found


def write_tars(folder: Path, images: int, pictures: list[bytes]) -> str:
    """Tars of so many images; their pattern."""
    folder.mkdir()
    for first in range(0, images, _A_TAR):
        with open(folder / f"images-{first // _A_TAR:05d}.tar", "wb") as stream:
            tar = TarWriter(stream)
            for number in range(first, min(first + _A_TAR, images)):
                tar.add(f"{number:09d}.jpg", pictures[number % len(pictures)])
            tar.close()
    return str(folder / "*.tar")


def write_files(folder: Path, images: int, pictures: list[bytes]) -> None:
    folder.mkdir()
    for number in range(images):
        (folder / f"{number:09d}.jpg").write_bytes(pictures[number % len(pictures)])


def seer(*words: str) -> float:
    """Runs a command; seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "seer", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(run: Path, shards: str) -> tuple[float, float]:
    """Seconds from the start of the command to the line of its first step, and those of CPU time."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "seer", "train", *_RUN, f"data.shards={shards}", f"run_dir={run}"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll():
            raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    process.wait()
    return seconds, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def packed(files: Path, out: Path) -> tuple[float, float]:
    """Seconds of `seer shards pack`, and those until it makes its first tar."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "seer", "shards", "pack", str(files), "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while process.poll() is None and not any(".tar" in name for name in (os.listdir(out) if out.exists() else ())):
        time.sleep(0.02)
    listed = time.perf_counter() - began
    if process.wait():
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return time.perf_counter() - began, listed


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=1_000_000, help="images in the shards (1000000)")
    arguments.add_argument("--rounds", type=int, default=3, help="runs of each kind (3)")
    arguments.add_argument("--files", action="store_true", help="also pack as many files that lie in one folder")
    arguments.add_argument("--folder", type=Path, help="where to write (the system's temporary folder)")
    arguments.add_argument("--out", type=Path, help="write the figures there too")
    given = arguments.parse_args()
    images = pictures()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        many = write_tars(folder / "many", given.images, images)
        few = write_tars(folder / "few", 1_000, images)
        summary = {"images": given.images, "index_seconds": round(seer("shards", "index", many), 1)}
        seer("shards", "index", few)
        seconds: dict[str, list[tuple[float, float]]] = {"many": [], "few": []}
        for number in range(given.rounds):
            for kind, shards in (("many", many), ("few", few)):
                seconds[kind].append(first_step(folder / f"run-{kind}-{number}", shards))
        for kind, words in (("many", "first_step"), ("few", "small")):
            wall, cpu = (round(statistics.median(taken), 2) for taken in zip(*seconds[kind], strict=True))
            summary |= {f"{words}_seconds": wall, f"{words}_cpu_seconds": cpu}
        if given.files:
            write_files(folder / "files", given.images, images)
            pack_seconds, listed_seconds = packed(folder / "files", folder / "packed")
            summary |= {"pack_seconds": round(pack_seconds, 1), "listed_seconds": round(listed_seconds, 1)}
    if given.out:
        given.out.write_text(json.dumps({**machine(), "seconds": seconds, "summary": summary}, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
