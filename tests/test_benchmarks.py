"""The benchmarks run and say what they promise; what they measure is for a quiet machine."""

import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from seer.decoders import installed_decoders

ROOT = Path(__file__).resolve().parents[1]


def last_line(script: str, *arguments: str | Path) -> Any:
    """What a benchmark ends with, from a process of its own."""
    ran = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / script, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_step_benchmark_ends_with_its_ratios(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    told = last_line("bench_step.py", "--quick", "--model", "tiny", "--threads", "1", "--out", out)
    assert told.keys() == {"tiny_ratio", "outside_backbone_share", "observer_overhead"}
    assert told["outside_backbone_share"].keys() == {"tiny"}
    written = json.loads(out.read_text())
    assert written["summary"] == told
    rows = written["models"]["tiny"]["rows"]
    fair = [row["cpu_ratio"] for label, row in rows.items() if label != "each at its defaults"]
    assert len(fair) == 4
    assert told["tiny_ratio"] == round(min(fair), 3) > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoint_benchmark_ends_with_its_ratios(tmp_path: Path, ranks: int) -> None:
    out = tmp_path / "checkpoint.json"
    told = last_line("bench_checkpoint.py", "--quick", "--ranks", str(ranks), "--folder", tmp_path, "--out", out)
    assert told["save_ratio"] > 0 and told["load_ratio"] > 0 and told["stall_seconds"] > 0
    assert 8 < told["megabytes"] < 12
    written = json.loads(out.read_text())
    assert written["summary"] == told and written["ranks"] == ranks
    assert all(len(times) == 2 for times in written["seconds"].values())
    assert os.listdir(tmp_path) == ["checkpoint.json"]


def test_pack_benchmark_ends_with_its_ratios(tmp_path: Path) -> None:
    told = last_line("bench_pack.py", "--quick", "--folder", tmp_path, "--out", tmp_path / "pack.json")
    assert told.keys() == {
        "cp_wall_ratio", "cp_cpu_ratio", "tar_wall_ratio", "tar_cpu_ratio", "files_a_cpu_second",
    }  # fmt: skip
    written = json.loads((tmp_path / "pack.json").read_text())
    assert written["summary"] == told and written["files"] == 200 and len(written["seconds"]["pack"]) == 2
    assert os.listdir(tmp_path) == ["pack.json"]


@pytest.mark.slow
def test_start_benchmark_ends_with_its_seconds(tmp_path: Path) -> None:
    told = last_line(
        "bench_start.py",
        *("--images", "2000", "--rounds", "1", "--files"),
        *("--folder", tmp_path, "--out", tmp_path / "start.json"),
    )
    assert told["images"] == 2000
    assert told["first_step_seconds"] > 0 and told["small_seconds"] > 0
    assert told["pack_seconds"] >= told["listed_seconds"] > 0
    assert json.loads((tmp_path / "start.json").read_text())["summary"] == told
    assert os.listdir(tmp_path) == ["start.json"]


def test_pool_benchmark_ends_with_its_ratios(tmp_path: Path) -> None:
    out = tmp_path / "pool.json"
    told = last_line("bench_pool.py", "--batch", "8", "--batches", "2", "--rounds", "1", "--out", out)
    assert told.keys() == {"main_ms", "main_ratio", "cpu_ratio", "speed_ratio", "cpu_efficiency"}
    assert json.loads(out.read_text())["summary"] == told


def test_photometric_benchmark_compares_its_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where the compiler, which takes a minute, is left out: the graph runs as it was traced."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = importlib.import_module("bench_photometric")
    out = tmp_path / "photometric.json"
    command = ["bench_photometric.py", "--drivers", "cpu", "--quick", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert script.main() in (0, 1)
    (row,) = json.loads(out.read_text())["results"]
    assert row["ratio"] == pytest.approx(row["subsets_ms"] / row["compiled_ms"]) and row["compile_seconds"] > 0
    torch.compiler.reset()


def test_loader_benchmark_ends_with_its_ratios(tmp_path: Path) -> None:
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 10, 3), np.uint8)
        Image.fromarray(pixels).resize((250, 190)).save(tmp_path / f"{number}.jpg")
    out = tmp_path / "loader.json"
    told = last_line(
        "bench_loader.py", "--images", tmp_path, "--batch", "4", "--batches", "1", "--rounds", "1", "--out", out
    )
    assert told.keys() == {"webdataset", "seer_pillow", "seer_wheels", "seer_simd", "seer_best", "dali"}
    here = {"seer_pillow": "pillow", "seer_wheels": "simplejpeg", "seer_simd": "pillow-simd"}
    for name, decoder in here.items():
        assert (told[name] is not None) == (decoder in installed_decoders())
    assert told["webdataset"] > 0 and told["seer_best"] >= max(told[name] or 0 for name in here)
    written = json.loads(out.read_text())
    assert written["summary"]["ratios"] == told
    assert written["rounds"]["workers"].keys() == set(installed_decoders())


@pytest.mark.slow
def test_remote_benchmark_ends_with_its_ratios(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 10, 3), np.uint8)
        Image.fromarray(pixels).resize((250, 190)).save(tmp_path / "images" / f"{number}.jpg")
    told = last_line(
        "bench_remote.py",
        *("--images", tmp_path / "images", "--latencies", "0", "5", "--batch", "4", "--batches", "1", "--rounds", "1"),
        *("--cold-shards", "3", "--cold-megabytes", "0.05", "--folder", tmp_path, "--out", tmp_path / "remote.json"),
    )
    kinds = [f"{kind}_{workers}" for kind in ("files", "cache", "ranges") for workers in (0, 2)]
    assert told["ratios"].keys() == {f"{kind}_{latency}ms" for kind in kinds for latency in (0, 5)}
    assert all(ratio > 0 for ratio in told["ratios"].values())
    cache, ranges = told["cold"]["cache"], told["cold"]["ranges"]
    # Whole shards are sent once; the others were not asked for as a whole, and an image comes again in each epoch.
    assert cache["sent_ratio"] == pytest.approx(1, abs=0.05)
    assert ranges["requests"] > 20 * 4 and cache["requests"] < 20
    assert json.loads((tmp_path / "remote.json").read_text())["summary"] == told
    assert sorted(os.listdir(tmp_path)) == ["images", "remote.json"]
