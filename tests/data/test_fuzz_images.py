"""Mutated images of every format: no crash, no hang, bounded memory, and every image is good or bad for a reason.

Long form: python -m pytest -m slow tests/data/test_fuzz_images.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import hostile_images
import numpy as np
import pytest
from hostile_images import MEMORY, SEEDS, fate, mutated
from image_cases import CASES

from seer.decoders import installed_decoders

REASONS = {
    *(
        "not_an_image",
        "truncated",
        "undecodable",
        "unsupported_mode",
        "too_many_bytes",
        "too_many_scans",
        "too_many_segments",
        "too_many_strips",
    ),
    *("too_many_pixels", "side_too_long", "side_too_short", "aspect_ratio"),
}
# Python, numpy and Pillow, and the largest image that is allowed at its worst: a progressive JPEG in CMYK holds 8 bytes
# of coefficients a pixel, 4 of CMYK and 4 of RGB.
PEAK = (100 << 20) + 16 * 64_000_000


def decoded(first: int, count: int, folder: Path, decoder: str, timeout: float) -> dict[str, Any]:
    """What a process says that decodes these images."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "tests" / "hostile_images.py"), str(first), str(count), str(folder), decoder]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, errors="replace")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit code {done.returncode} at image {lines[-1:]}\n{done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def judge(found: dict[str, Any], count: int) -> None:
    fates = Counter(found["fates"])
    assert fates.total() == found["compared"] == count, "good and bad ones are all"
    # Out of memory is not among them: then it would depend on the machine what is replaced.
    assert set(fates) <= REASONS | {"good"}
    assert min(fates[what] for what in ("good", "not_an_image", "truncated", "undecodable")) > count / 50
    assert found["peak"] < PEAK < MEMORY


@pytest.mark.parametrize("decoder", installed_decoders())
def test_mutated_images(tmp_path: Path, decoder: str) -> None:
    judge(decoded(0, 600, tmp_path, decoder, timeout=120), 600)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("decoder", installed_decoders())
def test_many_mutated_images(tmp_path: Path, decoder: str) -> None:
    count = 50_000
    found = decoded(1_000_000, count, tmp_path, decoder, timeout=1700)
    print(found)
    judge(found, count)
    assert set(found["fates"]) > {"too_many_pixels", "side_too_long", "aspect_ratio", "too_many_scans"}


def test_every_mutation_and_seed_takes_part() -> None:
    """Few images stay as they were, every seed is good before it is mutated, and numbers name images."""
    assert [fate(seed) for seed in SEEDS] == ["good"] * len(CASES)
    images = [mutated(number) for number in range(200)]
    assert sum(image in SEEDS for image in images) < 20 and mutated(7) == images[7]
    for mutation in hostile_images._MUTATIONS:
        rng = np.random.default_rng(0)
        assert mutation(b"", rng) is not None
        assert any(mutation(seed, rng) != seed for seed in SEEDS)


ENDLESS = """
import sys
from pathlib import Path
import seer.data.decode

def open_image(data, limits=None):
    while True:
        pass

seer.data.decode.open_image = open_image
import hostile_images

hostile_images.SECONDS = 0.1
hostile_images.main(5, 1, Path("."), "pillow")
"""


def test_an_image_that_takes_for_ever_would_be_named() -> None:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", ENDLESS], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGPROF and done.stdout.split() == ["5"]
