"""What do colour and blur cost on a CPU, beside Pillow's chain as SwAV uses it?

    python benchmarks/bench_photometric.py --out docs/benchmarks/photometric.json

For crops of 224, 96 and 48 pixels: process CPU time a crop, both sides in turn on the same crops and the same random
choices, medians over rounds. Pillow's side is brightness, contrast, saturation, hue (in 8-bit HSV) in random order,
grayscale, GaussianBlur (an approximation by boxes), conversion to a float tensor and normalisation; ours is one call on
the batch. Exits with 1 if ours is slower at any size.

    python benchmarks/bench_photometric.py --drivers cuda --out photometric_gpu.json

compares our two drivers on one device instead: one operation after the other on the crops that it applies to, which
runs on CPUs, and all operations compiled to one call, which runs on GPUs. Wall-clock time a crop until the device is
done, in turn on the same crops, medians over rounds; compiling is told beside. Exits with 1 if the compiled one is
slower at any size (on a CPU it is).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from swav_recipe import brightness, contrast, finished, hue, saturation
from torch import Tensor

from seer.data.photometric import photometric
from seer.data.photometric_masked import compiled_photometric
from seer.data.photometric_parameters import (
    BRIGHTNESS,
    CONTRAST,
    DRAWS,
    GRAYSCALE,
    HUE,
    JITTER,
    ORDER,
    ORDERS,
    SATURATION,
    SIGMA,
    PhotometricSpec,
    photometric_parameters,
)

SIZES = {224: 32, 96: 128, 48: 256}  # pixels: crops a round
GPU_SIZES = {224: 512, 96: 1024, 48: 1024}  # of 256 images: 2 large crops, 4 small ones
QUICK_SIZES = {16: 8}
OPERATIONS = {BRIGHTNESS: brightness, CONTRAST: contrast, SATURATION: saturation, HUE: hue}


def pillow_chain(image: Image.Image, row: np.ndarray) -> Tensor:
    """One crop, as SwAV's transforms treat it."""
    order = ORDERS[int(row[ORDER])] if row[JITTER] else ()
    operations = [(OPERATIONS[operation], float(row[operation])) for operation in order]
    return finished(image, operations, grey=bool(row[GRAYSCALE]), sigma=float(row[SIGMA]) or None)


def crops_of(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth colours with some noise: (count, size, size, 3) uint8."""
    coarse = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in coarse]
    return np.clip(np.stack(smooth) + rng.normal(0, 8, (count, size, size, 3)), 0, 255).astype(np.uint8)


def cpu_milliseconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def measure(size: int, count: int, rounds: int) -> dict[str, float]:
    rng, spec = np.random.default_rng(size), PhotometricSpec()
    ours, pillow = [], []
    for number in range(rounds + 1):
        pixels = crops_of(size, count, rng)
        parameters = photometric_parameters(rng.random((count, DRAWS)), spec)
        images = [Image.fromarray(one) for one in pixels]
        tensors = torch.from_numpy(pixels), torch.from_numpy(parameters)
        for side in (0, 1) if number % 2 else (1, 0):
            if side == 0:
                ours.append(cpu_milliseconds(lambda: photometric(*tensors, spec)) / count)  # noqa: B023
            else:
                chain = lambda: [pillow_chain(*pair) for pair in zip(images, parameters, strict=True)]  # noqa: B023, E731
                pillow.append(cpu_milliseconds(chain) / count)
    found, other = statistics.median(ours[1:]), statistics.median(pillow[1:])  # the first round warms up
    return {"size": size, "crops": count, "ours_ms": found, "pillow_ms": other, "ratio": other / found}


def wall_milliseconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def measure_drivers(size: int, count: int, rounds: int, device: torch.device) -> dict[str, float]:
    rng, spec, dtype = np.random.default_rng(size), PhotometricSpec(), torch.float32
    begun = time.perf_counter()
    compiled = compiled_photometric([(count, size, size, 3)], spec, dtype, device)
    compile_seconds = time.perf_counter() - begun
    times: dict[str, list[float]] = {"subsets": [], "compiled": []}
    for number in range(rounds + 1):
        pixels = torch.from_numpy(crops_of(size, count, rng)).to(device)
        parameters = torch.from_numpy(photometric_parameters(rng.random((count, DRAWS)), spec))
        calls = {
            "subsets": lambda: photometric(pixels, parameters, spec, dtype),  # noqa: B023
            "compiled": lambda: compiled(pixels, parameters),  # noqa: B023
        }
        wall_milliseconds(lambda: None, device)  # the copy is done before the first clock starts
        for name in sorted(calls, reverse=bool(number % 2)):
            times[name].append(wall_milliseconds(calls[name], device) / count)
    subsets, ours = (statistics.median(times[name][1:]) for name in ("subsets", "compiled"))  # the first warms up
    row = {"size": size, "crops": count, "compiled_ms": ours, "subsets_ms": subsets, "ratio": subsets / ours}
    return row | {"compile_seconds": compile_seconds}


def beside_pillow(rounds: int) -> list[dict[str, float]]:
    results = []
    print(f"{'pixels':>6} {'ours, ms a crop':>16} {'Pillow, ms a crop':>18} {'times as fast':>14}")
    for size, count in SIZES.items():
        row = measure(size, count, rounds)
        results.append(row)
        print(f"{size:>6} {row['ours_ms']:>16.3f} {row['pillow_ms']:>18.3f} {row['ratio']:>14.2f}", flush=True)
    return results


def beside_each_other(sizes: dict[int, int], rounds: int, device: torch.device) -> list[dict[str, float]]:
    results = []
    heads = f"{'compiled, ms a crop':>20} {'subsets, ms a crop':>19} {'times as fast':>14} {'compiling, s':>13}"
    print(f"{'pixels':>6} {heads}")
    for size, count in sizes.items():
        row = measure_drivers(size, count, rounds, device)
        results.append(row)
        figures = f"{row['compiled_ms']:>20.4f} {row['subsets_ms']:>19.4f} {row['ratio']:>14.2f}"
        print(f"{size:>6} {figures} {row['compile_seconds']:>13.1f}", flush=True)
    return results


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--drivers", choices=("cpu", "cuda"), help="compare our two drivers on this device")
    arguments.add_argument("--quick", action="store_true", help="with --drivers: one tiny size, to see that it runs")
    arguments.add_argument("--out", type=Path)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.drivers or "cpu")
    if options.drivers:
        sizes = QUICK_SIZES if options.quick else SIZES if device.type == "cpu" else GPU_SIZES
        results = beside_each_other(sizes, options.rounds, device)
    else:
        results = beside_pillow(options.rounds)
    if options.out:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "threads": options.threads,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "pillow": PIL.__version__,
            "results": results,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if all(row["ratio"] >= 1 for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
