"""What do the data workers' hand-overs cost, beside torch's DataLoader with whole batches in fresh shared memory?

    python benchmarks/bench_pool.py --out pool.json

Both make the same batches (checked) of the same images, noise as JPEG of 500x375, with 2x224 + 4x96 crops. Rounds are
interleaved. ``main_ms``: CPU time of the main process a batch. ``cpu_ms_per_image``: of all processes, beside the
images made in a single process ("inline").
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from seer.data.crops import CropSpec
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import DataStream
from seer.shard_list import ShardList
from seer.shards.pack import pack

_FIRST = 8  # batches: more than there are slots for

CROPS = [CropSpec(2, 224, 0.14, 1.0), CropSpec(4, 96, 0.05, 0.14)]


def make_shards(folder: Path, images: int) -> ShardList:
    """Smooth noise, which compresses about as photographs do."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (40, 54, 3), np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=90)
        (folder / "images" / f"{number}.jpg").write_bytes(buffer.getvalue())
    pack(folder / "images", folder / "shards", samples_per_shard=64, workers=1)
    return ShardList.open(str(folder / "shards" / "*.tar"))


class WholeBatches(Dataset[tuple[list[torch.Tensor], list[torch.Tensor]]]):
    """Number of a batch -> its tensors, written into fresh shared memory."""

    def __init__(self, stream: DataStream) -> None:
        self.assembler = stream._assembler

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        kinds = {np.uint8: torch.uint8, np.float32: torch.float32}
        arrays = [torch.empty(shape, dtype=kinds[kind]).share_memory_() for shape, kind in self.assembler.layout]
        crops, parameters = arrays[: len(CROPS)], arrays[len(CROPS) :]
        rows = range(self.assembler.images)
        self.assembler.fill(index, rows, [x.numpy() for x in crops], [x.numpy() for x in parameters])
        return crops, parameters


def as_it_is(made: object) -> object:
    return made


def torch_loader(stream: DataStream, workers: int) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    loader = DataLoader(
        WholeBatches(stream),
        batch_size=None,
        sampler=itertools.count(),
        num_workers=workers,
        collate_fn=as_it_is,
        worker_init_fn=lambda _: torch.set_num_threads(1),
        multiprocessing_context="fork",
        prefetch_factor=2,
    )
    return iter(loader)


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of some processes that live, to the microsecond: ticks of 10 ms are a few percent of a round."""
    threads = [thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def at_rest(pids: list[int]) -> float:
    """CPU time of workers once they have made all that they make ahead."""
    before, now = -1.0, cpu_seconds(pids)
    while now - before > 1e-3:
        time.sleep(0.02)
        before, now = now, cpu_seconds(pids)
    return now


def measure(batches: Iterator[object], pids: list[int], count: int, images: int) -> dict[str, float]:
    """From rest to rest, so that what is made ahead is counted once; what is started and touched first comes before."""
    for _ in range(_FIRST if pids else 1):
        next(batches)
    workers = at_rest(pids)
    main, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        next(batches)
    main = time.process_time() - main
    workers = at_rest(pids) - workers
    wall = time.perf_counter() - wall
    return {
        "main_ms": 1000 * main / count,
        "cpu_ms_per_image": 1000 * (main + workers) / (count * images),
        "images_per_second": count * images / wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=12, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)

    def stream(workers: int) -> DataStream:
        return DataStream(
            shards,
            seed=0,
            global_batch_size=given.batch,
            crops=CROPS,
            flip_probability=0.5,
            photometric=PhotometricSpec(),
            workers=workers,
        )

    found: dict[str, list[dict[str, float]]] = {"inline": [], "seer": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        shards = make_shards(Path(folder), 3 * given.batch)
        for _ in range(given.rounds):
            inline = stream(0)
            found["inline"].append(measure(inline.batches(0), [], max(2, given.batches // 4), given.batch))
            inline.close()
            ours = stream(given.workers)
            batches = ours.batches(0)
            found["seer"].append(measure(batches, ours.worker_pids, given.batches, given.batch))
            ours.close()
            theirs = torch_loader(inline, given.workers)
            pids = [worker.pid for worker in theirs._workers]  # type: ignore[attr-defined]
            found["torch"].append(measure(theirs, pids, given.batches, given.batch))
            del theirs
        ours, theirs = stream(given.workers), torch_loader(inline, given.workers)
        for made, other in itertools.islice(zip(ours.batches(0), theirs, strict=False), 3):
            pairs = zip((*made.crops, *made.photometric), (*other[0], *other[1]), strict=True)
            assert all(torch.equal(one, two) for one, two in pairs)
        ours.close()
        del theirs
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    print(f"{given.workers} workers, batches of {given.batch}, medians of {given.rounds} rounds")
    print(f"{'':8}{'main_ms':>12}{'cpu_ms/image':>14}{'images/s':>10}")
    for name, row in medians.items():
        print(f"{name:8}{row['main_ms']:12.3f}{row['cpu_ms_per_image']:14.3f}{row['images_per_second']:10.0f}")
    summary = {
        "main_ms": round(medians["seer"]["main_ms"], 3),
        "main_ratio": round(medians["torch"]["main_ms"] / medians["seer"]["main_ms"], 2),
        "cpu_ratio": round(medians["torch"]["cpu_ms_per_image"] / medians["seer"]["cpu_ms_per_image"], 3),
        "speed_ratio": round(medians["seer"]["images_per_second"] / medians["torch"]["images_per_second"], 3),
        "cpu_efficiency": round(medians["inline"]["cpu_ms_per_image"] / medians["seer"]["cpu_ms_per_image"], 3),
    }
    if given.out:
        given.out.write_text(json.dumps({"summary": summary, "rounds": found}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
