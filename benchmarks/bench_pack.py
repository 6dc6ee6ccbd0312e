"""What does packing small files cost, beside copying them?

    python benchmarks/bench_pack.py --out pack.json            # 10,000 JPEGs of 3 KB, made here
    python benchmarks/bench_pack.py --images DIR               # a folder of one's own
    python benchmarks/bench_pack.py --quick                    # does it run at all

`cp -r`, `tar cf` and `seer shards pack` with one worker take turns in each round on the same files, which lie in the
page cache. A ratio is the median over rounds of their seconds by ours: 1 is as fast, 2 twice as fast. Ours also sorts,
shuffles, takes the digest, writes the index and waits for the disk (fsync), which the others do not. Start-up of the
interpreter is not counted: it is paid once, not a file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image

from seer.shards.pack import pack


def make_images(folder: Path, count: int) -> Path:
    """Smooth random JPEGs of 96 x 96 pixels, about 3 KB each, the same ones each time."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8))
        small.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"photo-{number:07d}.jpg", quality=80)
    return folder


def ran(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a program."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def packed(images: Path, out: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a pack in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    pack(images, out, workers=1)
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of images instead of 10,000 that are made")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="200 images, 2 rounds")
    parser.add_argument("--out", type=Path, help="all that was measured, as JSON")
    chosen = parser.parse_args()
    rounds = 2 if chosen.quick else chosen.rounds
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        work = Path(name)
        images = chosen.images or make_images(work / "images", 200 if chosen.quick else 10_000)
        sizes = [file.stat().st_size for file in images.rglob("*") if file.is_file()]
        measured: dict[str, list[tuple[float, float]]] = {"cp -r": [], "tar cf": [], "pack": []}
        for _ in range(rounds + 1):
            measured["cp -r"].append(ran(["cp", "-r", str(images), str(work / "copy")]))
            measured["tar cf"].append(ran(["tar", "cf", str(work / "copy.tar"), "-C", str(images), "."]))
            measured["pack"].append(packed(images, work / "pack"))
            for copy in ("copy", "pack"):
                shutil.rmtree(work / copy)
    seconds = {what: times[1:] for what, times in measured.items()}  # the first round fills the cache
    print(f"{len(sizes):,} files of {statistics.mean(sizes) / 1000:.1f} kB, {rounds} rounds")
    print(f"{'':10}{'wall s':>9}{'CPU s':>9}{'files/s':>10}{'a CPU s':>10}")
    for what, times in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{what:10}{wall:9.3f}{cpu:9.3f}{len(sizes) / wall:10,.0f}{len(sizes) / cpu:10,.0f}")
    summary = {
        f"{short}_{clock}_ratio": round(
            statistics.median(a[at] / b[at] for a, b in zip(seconds[what], seconds["pack"], strict=True)), 2
        )
        for what, short in (("cp -r", "cp"), ("tar cf", "tar"))
        for at, clock in enumerate(("wall", "cpu"))
    }
    summary["files_a_cpu_second"] = round(len(sizes) / statistics.median(cpu for _, cpu in seconds["pack"]))
    if chosen.out:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "date": date.today().isoformat()}
        told = {"summary": summary, "files": len(sizes), "bytes": sum(sizes), "seconds": seconds, **machine}
        chosen.out.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
