"""What bad images cost: processor time of batches with one image in twenty damaged, against the same without damage.

    python benchmarks/bench_bad_images.py [--batches 20] [--train-steps 15] [--out FILE]

Two shards of the same JPEG images (500 x 375), the second with truncated files, garbage and HTML pages among them:
batches are made in turn in one process (SwAV's crops, 2 x 224 and 4 x 96), and the medians of rounds are compared.
A damaged image should cost no more than the good one that takes its place: ``cost_ratio`` is 1 + ``bad_share`` + 0.05
at most. ``train_cost_ratio``: the same of whole runs (the demo's tiny network and crops, in one process).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from seer.compose import compose
from seer.data.assembly import BatchAssembler
from seer.data.crops import CropSpec
from seer.data.growth import GrowingOrder
from seer.data.photometric_parameters import PhotometricSpec
from seer.shard_index import ShardIndex, index_path, save_index
from seer.shard_list import ShardList
from seer.training import loop

_SPECS = [CropSpec(2, 224, 0.14, 1.0), CropSpec(4, 96, 0.05, 0.14)]
_IMAGES, _BATCH, _EVERY, _ROUNDS = 480, 64, 20, 3


def photograph(number: int) -> bytes:
    """A JPEG of about 60 KB: coarse colours and some noise; every fourth is progressive."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(coarse) + rng.normal(0, 12, (375, 500, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88, progressive=number % 4 == 0)
    return buffer.getvalue()


def damaged(data: bytes, number: int) -> bytes:
    """Truncated somewhere, or something else under its name."""
    kind = number // _EVERY % 3
    if kind == 0:
        return data[: int(len(data) * np.random.default_rng(number).uniform(0.1, 1.0)) - 2]
    return np.random.default_rng(number).bytes(len(data)) if kind == 1 else b"<html>not found</html>" * 200


def assembler(folder: Path, name: str, images: list[bytes]) -> BatchAssembler:
    path = folder / name
    path.write_bytes(b"".join(images))
    sizes = np.array([len(image) for image in images], np.uint32)
    offsets = np.append(0, np.cumsum(sizes))[:-1].astype(np.uint64)
    labels = np.full(len(images), -1, np.int32)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    shard = ShardIndex(str(path), offsets, sizes, labels, int(sizes.sum()), digest)
    save_index(shard, index_path(path))
    order = GrowingOrder(np.array([len(images)]), seed=0, global_batch_size=_BATCH)
    return BatchAssembler(
        ShardList([shard]),
        order,
        seed=0,
        slots=np.arange(_BATCH),
        specs=_SPECS,
        flip_probability=0.5,
        photometric=PhotometricSpec(),
    )


def trained(folder: Path, name: str, steps: int, number: int) -> tuple[float, int]:
    """CPU seconds of a run from beginning to end, and the images that it replaced."""
    words = (
        *("experiment=demo", f"data.shards={folder / name}", f"run_dir={folder}/run-{name}-{number}"),
        *(f"train.steps={steps}", "data.workers=0", "train.threads=1", "data.max_bad_share=1"),
        *("evaluation.every_steps=0", "evaluation.train=[]", "evaluation.val=[]"),
    )
    config = compose(list(words))
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        ended = loop.run(config)
    if ended.exit_code:
        raise SystemExit(f"training on {name} did not end")
    return time.process_time() - began, ended.result["bad_samples"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--batches", type=int, default=20, help="timed batches of each kind (20)")
    arguments.add_argument("--train-steps", type=int, default=15, help="steps of each run (15), 64 images each")
    arguments.add_argument("--out", type=Path, help="write the figures there too")
    given = arguments.parse_args()
    images = [photograph(number) for number in range(_IMAGES)]
    with tempfile.TemporaryDirectory() as folder:
        spoilt = [damaged(image, n) if n % _EVERY == 0 else image for n, image in enumerate(images)]
        streams = [assembler(Path(folder), "clean", images), assembler(Path(folder), "spoilt", spoilt)]
        out = [np.zeros(shape, dtype) for shape, dtype in streams[0].layout]
        crops, parameters = out[: len(_SPECS)], out[len(_SPECS) :]
        seconds: list[list[float]] = [[], []]
        reasons, opened = Counter[str](), 0
        for batch in range(-1, given.batches):  # the first is not timed
            for kind in (0, 1) if batch % 2 else (1, 0):
                began = time.process_time()
                bad = streams[kind].fill(max(batch, 0), range(_BATCH), crops, parameters)
                if batch >= 0:
                    seconds[kind].append(time.process_time() - began)
                    reasons.update(sample.reason for sample in bad)
                    opened += _BATCH * kind
        trained(Path(folder), "clean", 1, -1)  # what is done once a process
        runs: list[list[float]] = [[], []]
        replaced = 0
        for number in range(_ROUNDS):
            for kind in (0, 1) if number % 2 else (1, 0):
                taken, bad_samples = trained(Path(folder), ("clean", "spoilt")[kind], given.train_steps, number)
                runs[kind].append(taken)
                replaced += bad_samples
    ratios = [spoilt / clean for clean, spoilt in zip(*seconds, strict=True)]
    found = {
        "clean_ms_an_image": round(1000 * statistics.median(seconds[0]) / _BATCH, 3),
        "bad_share": round(reasons.total() / opened, 4),
        "cost_ratio": round(sum(seconds[1]) / sum(seconds[0]), 4),
        "median_cost_ratio": round(statistics.median(ratios), 4),
        "reasons": dict(reasons),
        "train_cost_ratio": round(statistics.median(runs[1]) / statistics.median(runs[0]), 4),
        "train_bad_share": round(replaced / (_ROUNDS * given.train_steps * _BATCH), 4),
    }
    print(json.dumps(found))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
