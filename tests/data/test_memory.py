"""Memory of the main process and of every data worker over a million samples."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from evaluation_shards import png

from seer.data.crops import CropSpec
from seer.data.mixture import SourceShare
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import DataStream
from seer.shard_index import ShardIndex
from seer.shard_list import ShardList
from seer.shards.tar_writing import TarWriter

SHARDS, A_SHARD = 400, 250  # more than a process keeps open
BATCH = 200


def kilobytes(pid: int) -> int:
    """Memory of a process but for the files it maps: how much of those is there depends on other processes too."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem"))


def many_shards(folder: Path) -> ShardList:
    """A hundred thousand images of 32 pixels; one in fifty is damaged."""
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(50)]
    images[7] = images[7][:900]
    shards = []
    for number in range(SHARDS):
        path = folder / f"{number:04d}.tar"
        with open(path, "wb") as stream:
            tar = TarWriter(stream)
            offsets = [tar.add(f"{place:06d}.png", images[(place + number) % 50]) for place in range(A_SHARD)]
            digest = tar.close()
        sizes = np.array([len(images[(place + number) % 50]) for place in range(A_SHARD)], np.uint32)
        labels = np.full(A_SHARD, -1, np.int32)
        shards.append(ShardIndex(str(path), np.array(offsets, np.uint64), sizes, labels, tar.size, digest))
    return ShardList(shards)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("samples", [1_000_000])
def test_memory_stays_flat_over_a_million_samples(tmp_path: Path, samples: int) -> None:
    """In lanes and windows of a mixture, over ten epochs; from a tenth of the way on nothing grows."""
    stream = DataStream(
        many_shards(tmp_path),
        seed=0,
        global_batch_size=BATCH,
        crops=[CropSpec(2, 16, 0.3, 1.0), CropSpec(2, 8, 0.1, 0.4)],
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        workers=2,
        lanes=10,
        window=1_000,
        sources=[SourceShare("web", 3, SHARDS - 100), SourceShare("own", 1, 100)],
    )
    batches = samples // BATCH
    sizes: list[list[int]] = []
    files: list[list[int]] = []
    for number, batch in enumerate(itertools.islice(stream.batches(0), batches), start=1):
        assert batch.crops[0].shape == (2 * BATCH, 16, 16, 3)
        if number % (batches // 20) == 0:
            pids = [os.getpid(), *stream.worker_pids]
            sizes.append([kilobytes(pid) for pid in pids])
            files.append([len(os.listdir(f"/proc/{pid}/fd")) for pid in pids])
            print(f"{number * BATCH:,} samples: {sizes[-1]} kB, {files[-1]} files", flush=True)
    assert stream.worker_deaths == 0
    stream.close()
    for early, late in zip(sizes[1], sizes[-1], strict=True):
        assert late - early < 2048 and late < 1.05 * early, sizes
    assert files[-1] == files[1]
