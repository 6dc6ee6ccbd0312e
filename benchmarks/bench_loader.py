"""How many times as fast as the published SwAV recipe are images made into crops, on a core?

    python benchmarks/bench_loader.py --images DIR --simd-python PYTHON --out loader.json

DIR holds JPEGs, best photographs of 500x375; each becomes 2x224 + 4x96 crops. PYTHON is an environment in which
data_shards/install_pillow_simd.sh was run, with seer's dependencies and simplejpeg. NVIDIA DALI takes part, on the CPU,
where one of the two environments has it. Every decoder has a process of its own, with one thread; all stay up and take
turns, so that a round sees the same machine. Process CPU time, medians.

The recipe is SwAV's (swav_recipe.py). ``alone``: from bytes to crops, which for the recipe are normalised floats and
for the others uint8, as seer's workers hand them over. ``floats``: with colour, blur and normalisation, for a machine
without a GPU. ``tar to batch``: two worker processes each, the recipe under plain webdataset and torch's DataLoader;
CPU time of all processes. ``efficiency``: CPU time alone over that with workers, median of the rounds' ratios. The last
line has ratios to the recipe alone, in images a CPU second; null: not installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_pool import CROPS, measure
from machine import machine
from swav_recipe import crops_of
from torch import Tensor

from seer.data.photometric import photometric
from seer.data.photometric_parameters import PhotometricSpec
from seer.data.stream import DataStream
from seer.shard_list import ShardList
from seer.shards.pack import pack

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2

Row = dict[str, float]


def recipe(data: bytes) -> list[Tensor]:
    return crops_of(data, CROPS)


# ---- what a round does, one function a kind ----


def open_stream(folder: Path, decoder: str, batch: int, workers: int) -> DataStream:
    return DataStream(
        ShardList.open(str(folder / "*.tar")),
        seed=0,
        global_batch_size=batch,
        crops=CROPS,
        flip_probability=0.5,
        photometric=PhotometricSpec(),
        decoder=decoder,
        workers=workers,
    )


def published(folder: Path, _: str, batch: int, batches: int) -> Callable[[], Row]:
    files = itertools.cycle(images_of(folder))
    return lambda: cpu_of(lambda: [recipe(next(files)) for _ in range(batch * batches)], batch * batches)


def alone(folder: Path, decoder: str, batch: int, batches: int, *, floats: bool = False) -> Callable[[], Row]:
    stream, spec = open_stream(folder, decoder, batch, 0), PhotometricSpec()
    made = stream.batches(0)

    def work() -> None:
        for one in itertools.islice(made, batches):
            for crops, parameters in zip(one.crops, one.photometric, strict=True) if floats else ():
                photometric(crops, parameters, spec)

    return lambda: cpu_of(work, batch * batches)


def floats(folder: Path, decoder: str, batch: int, batches: int) -> Callable[[], Row]:
    return alone(folder, decoder, batch, batches, floats=True)


def workers(folder: Path, decoder: str, batch: int, batches: int) -> Callable[[], Row]:
    def work() -> Row:
        stream = open_stream(folder, decoder, batch, WORKERS)
        try:
            made = stream.batches(0)
            return measure(made, stream.worker_pids, batches, batch)
        finally:
            stream.close()

    return work


def plain_webdataset(folder: Path, _: str, batch: int, batches: int) -> Callable[[], Row]:
    import webdataset
    from torch.utils.data import DataLoader

    tars = sorted(map(str, folder.glob("*.tar")))

    def work() -> Row:
        samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).repeat().shuffle(200).to_tuple("jpg")
        loader = DataLoader(
            samples.map_tuple(recipe).batched(batch),
            batch_size=None,
            num_workers=WORKERS,
            worker_init_fn=one_thread,
            multiprocessing_context="fork",
        )
        made = iter(loader)
        found = measure(made, [worker.pid for worker in made._workers], batches, batch)  # type: ignore[attr-defined]
        made._shutdown_workers()  # type: ignore[attr-defined]
        return found

    return work


def dali(folder: Path, _: str, batch: int, batches: int) -> Callable[[], Row]:
    from nvidia.dali import fn, pipeline_def, types

    files = [np.frombuffer(data, np.uint8) for data in images_of(folder)]

    @pipeline_def(batch_size=batch, num_threads=1, device_id=None)
    def crops() -> tuple[object, ...]:
        read = fn.external_source(lambda sample: files[sample.idx_in_epoch % len(files)], batch=False)
        image = fn.decoders.image(read, output_type=types.RGB)
        made = [
            fn.random_resized_crop(
                image,
                size=(spec.size, spec.size),
                random_area=(spec.min_area, spec.max_area),
                random_aspect_ratio=(3 / 4, 4 / 3),
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            for spec in CROPS
            for _ in range(spec.count)
        ]
        return tuple(fn.flip(one, horizontal=fn.random.coin_flip()) for one in made)

    pipeline = crops()
    pipeline.build()
    return lambda: cpu_of(lambda: [pipeline.run() for _ in range(batches)], batch * batches)


def images_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder.parent / "images").iterdir())]


def one_thread(_: int) -> None:
    torch.set_num_threads(1)


def cpu_of(work: Callable[[], object], images: int) -> Row:
    began = time.process_time()
    work()
    return {"cpu_ms_per_image": 1000 * (time.process_time() - began) / images}


KINDS = {
    "recipe": published,
    "dali": dali,
    "alone": alone,
    "floats": floats,
    "workers": workers,
    "webdataset": plain_webdataset,
}


def serve(decoder: str, folder: Path, batch: int, batches: int) -> None:
    """A round for each line that comes in and names its kind."""
    torch.set_num_threads(1)
    works: dict[str, Callable[[], Row]] = {}
    for line in sys.stdin:
        kind = line.strip()
        if kind not in works:
            works[kind] = KINDS[kind](folder, decoder, batch, batches)
        print(json.dumps(works[kind]()), flush=True)


# ---- the main process ----


class Server:
    """A process that does rounds on demand."""

    def __init__(self, python: str, decoder: str, given: argparse.Namespace, shards: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [python, __file__, "--serve", decoder, str(shards), str(given.batch), str(given.batches)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def round(self, kind: str) -> Row:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with exit code {self.process.wait()} ({kind})")
        row: Row = json.loads(line)
        return row

    def close(self) -> None:
        self.process.communicate()


@dataclass
class Variant:
    """Rounds of a kind in a process."""

    kind: str
    name: str
    server: Server
    rows: list[Row] = field(default_factory=list)

    def median(self, key: str) -> float:
        rows = self.rows[1:] or self.rows  # what is touched first is not counted
        return statistics.median(row[key] for row in rows)


def paired(one: Variant, other: Variant) -> float:
    """CPU time of one over the other's, round by round: the machine is not as fast in each."""
    ratios = [a["cpu_ms_per_image"] / b["cpu_ms_per_image"] for a, b in zip(one.rows, other.rows, strict=True)]
    return statistics.median(ratios[1:] or ratios)


def installed_in(python: str) -> list[str]:
    """Decoders, and `dali`, of an environment."""
    code = """if True:
        import importlib.util, json, seer.decoders
        dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
        print(json.dumps(seer.decoders.installed_decoders() + ["dali"] * bool(dali)))"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run([python, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[str] = json.loads(ran.stdout)
    return found


def shards_of(images: Path, folder: Path) -> Path:
    """The JPEGs of a folder, in it and as shards."""
    found = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
    if not found:
        raise SystemExit(f"{images} holds no JPEGs")
    (folder / "images").mkdir()
    for number, path in enumerate(found):
        (folder / "images" / f"{number:06}.jpg").write_bytes(path.read_bytes())
    pack(folder / "images", folder / "shards", samples_per_shard=max(1, len(found) // (2 * WORKERS)), workers=1)
    return folder / "shards"


def start(given: argparse.Namespace, shards: Path) -> list[Variant]:
    """Every variant that the two environments have."""
    pythons: dict[str, str] = {}
    for python in filter(None, (sys.executable, given.simd_python)):
        for what in installed_in(python):
            pythons.setdefault(what, python)
    theirs = Server(sys.executable, "", given, shards)
    found = [Variant("recipe", "recipe", theirs), Variant("webdataset", "webdataset", theirs)]
    for name, python in pythons.items():
        server = Server(python, name, given, shards)
        kinds = ("dali",) if name == "dali" else ("alone", "workers", "floats")
        found += [Variant(kind, name, server) for kind in kinds]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--simd-python", help="interpreter of an environment with pillow-simd")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8, help="a round")
    parser.add_argument("--rounds", type=int, default=9, help="the first one warms up")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        every = start(given, shards_of(given.images, Path(folder)))
        for number in range(given.rounds):
            for one in every[number % len(every) :] + every[: number % len(every)]:
                one.rows.append(one.server.round(one.kind))
        for server in {one.server for one in every}:
            server.close()
    found: dict[str, dict[str, Variant]] = {}
    for one in every:
        found.setdefault(one.kind, {})[one.name] = one
    summary = report(found, given)
    if given.out:
        rounds = {level: {name: one.rows for name, one in rows.items()} for level, rows in found.items()}
        about = {"machine": machine("pillow", "numpy", "webdataset"), "summary": summary, "rounds": rounds}
        given.out.write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(summary["ratios"]))


def report(found: dict[str, dict[str, Variant]], given: argparse.Namespace) -> dict[str, Any]:
    """Prints a table a level; the figures of all of them."""
    cost = {
        level: {name: one.median("cpu_ms_per_image") for name, one in rows.items()} for level, rows in found.items()
    }
    alone = cost["alone"] | cost.get("dali", {})
    base, plain = cost["recipe"]["recipe"], cost["webdataset"]["webdataset"]
    print(f"medians of {max(1, given.rounds - 1)} rounds; CPU ms an image; ratio: to the recipe alone, {base:.2f} ms")
    for level, rows in (("alone", alone), ("floats", cost["floats"])):
        print(f"\n{level:26}{'CPU ms':>8}{'ratio':>8}")
        for name, ms in rows.items():
            print(f"  {name:24}{ms:8.2f}{base / ms:8.2f}")
    columns = f"{'x webdataset':>14}{'images/s':>10}{'x':>6}{'main ms':>9}{'efficiency':>12}"
    print(f"\n{'tar to batch':26}{'CPU ms':>8}{'ratio':>8}{columns}")
    speed = found["webdataset"]["webdataset"].median("images_per_second")
    told: dict[str, Any] = {"cpu_ms_per_image": cost, "tar_to_batch": {}}
    for name, one in {**found["webdataset"], **found["workers"]}.items():
        ms, rate, main_ms = (one.median(key) for key in ("cpu_ms_per_image", "images_per_second", "main_ms"))
        efficiency = paired(found["alone"][name], one) if name in cost["alone"] else math.nan
        print(
            f"  {name:24}{ms:8.2f}{base / ms:8.2f}{plain / ms:14.2f}{rate:10.0f}{rate / speed:6.2f}{main_ms:9.2f}"
            f"{efficiency:12.2f}"
        )
        told["tar_to_batch"][name] = {
            "cpu_ratio_to_webdataset": round(plain / ms, 2),
            "wall_ratio_to_webdataset": round(rate / speed, 2),
            "main_ms_a_batch": round(main_ms, 3),
            "efficiency": None if math.isnan(efficiency) else round(efficiency, 3),
        }
    told["ratios"] = ratios(cost, base)
    return told


def ratios(cost: dict[str, dict[str, float]], base: float) -> dict[str, float | None]:
    """To the recipe alone, in images a CPU second."""
    named = {"seer_pillow": "pillow", "seer_wheels": "simplejpeg", "seer_simd": "pillow-simd"}
    told: dict[str, float | None] = {"webdataset": round(base / cost["webdataset"]["webdataset"], 2)}
    for name, decoder in named.items():
        told[name] = round(base / cost["alone"][decoder], 2) if decoder in cost["alone"] else None
    told["seer_best"] = round(base / min(cost["alone"].values()), 2)
    return told | {"dali": round(base / cost["dali"]["dali"], 2) if "dali" in cost else None}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
    else:
        main()
