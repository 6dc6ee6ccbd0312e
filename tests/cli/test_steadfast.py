"""A run outlives its standard output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import make_shards

SIZES = "data.large.size=32 data.small.size=24 data.workers=0 train.steps=4 train.global_batch_size=8 train.threads=1"


@pytest.mark.parametrize("gone", ["closed pipe", "full disk"])
def test_a_run_goes_on_without_its_output(tmp_path: Path, gone: str) -> None:
    shards, run = make_shards(tmp_path), tmp_path / "run"
    words = ["train", "experiment=small", "backbone=tiny", *SIZES.split(), "train.log_every_steps=1"]
    command = [sys.executable, "-m", "seer", *words, f"data.shards={shards}", f"run_dir={run}"]
    if gone == "full disk":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, target = os.pipe()
        os.close(reader)
    try:
        os.environ.pop("PYTHONUNBUFFERED", None)  # what is held back in a buffer must not fail the end either
        ended = subprocess.run(command, stdout=target, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(target)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr and "goes on without it" in ended.stderr
    assert json.loads((run / "result.json").read_text())["steps"] == 4
