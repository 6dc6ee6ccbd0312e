"""What is wrong is one line and exit code 2, from every process of a run: the same as from one, and nobody hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TINY = (
    *("experiment=demo", "data.workers=0", "data.large.size=32", "data.small.size=24", "data.small.count=2"),
    *("objective.prototypes=8", "objective.freeze_prototypes_steps=1", "train.steps=2", "train.global_batch_size=8"),
    *("train.threads=1", "train.log_every_steps=1", "train.precision=fp32", "evaluation.every_steps=0"),
    *("evaluation.train=[]", "evaluation.val=[]", "parallel.timeout_seconds=20"),
)


def seer(verb: str, shards: str, run: Path, *words: str, ranks: int = 1, **variables: str) -> subprocess.Popen[str]:
    """`seer VERB` as its users start it, with pipes for what it says."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    given = dict(
        word.split("=", 1) for word in (*TINY, f"data.shards={shards}", f"run_dir={run}", *words) if "=" in word
    )
    options = [word for word in words if "=" not in word]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "seer", verb, *options, *(f"{key}={value}" for key, value in given.items())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def told(process: subprocess.Popen[str]) -> list[str]:
    """Its lines on stderr that are ours (torchrun adds a page of its own)."""
    _, error = process.communicate(timeout=90)
    return [line for line in error.splitlines() if line.startswith("seer: ")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.strategy=single"], "parallel.strategy=single under 2 processes"),
        (["parallel.strategy=fsdp", "parallel.shard_ranks=3"], "parallel.shard_ranks=3 under 2 processes"),
    ],
)
def test_what_two_processes_cannot_do_is_told_once(tmp_path: Path, shards: str, words: list[str], message: str) -> None:
    process = seer("train", shards, tmp_path / "run", *words, ranks=2)
    lines = told(process)
    assert len(lines) == 1 and message in lines[0] and process.returncode != 0
    assert not (tmp_path / "run").exists()


def test_who_tells_is_the_first_to_leave(tmp_path: Path, shards: str) -> None:
    """A launcher ends all processes with the first that leaves: the silent one must not be it."""
    process = seer(
        "train",
        shards,
        tmp_path / "run",
        "train.global_batch_size=9",
        RANK="1",
        WORLD_SIZE="2",
        LOCAL_RANK="1",
        LOCAL_WORLD_SIZE="2",
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=4)
    process.terminate()
    assert told(process) == []


def test_processes_that_do_not_meet(tmp_path: Path, shards: str) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29671"}
    process = seer("train", shards, tmp_path / "run", "parallel.timeout_seconds=1", **variables)
    lines = told(process)
    assert process.returncode == 2 and len(lines) == 1 and "process 0 of 2" in lines[0] and "29671" in lines[0]
    assert not (tmp_path / "run").exists()


def test_one_process_of_one_needs_no_launcher(tmp_path: Path, shards: str) -> None:
    one = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "29672"}
    process = seer("train", shards, tmp_path / "run", "parallel.strategy=fsdp", "parallel.shard_ranks=1", **one)
    assert told(process) == [] and process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_the_first_step(tmp_path: Path, shards: str, number: signal.Signals) -> None:
    process = seer("train", shards, tmp_path / "run")
    while b"libtorch" not in Path(f"/proc/{process.pid}/maps").read_bytes():  # past Hydra, before the first step
        time.sleep(0.01)
    process.send_signal(number)
    assert told(process) == [f"seer: {number.name} before the first step: nothing to save"]
    assert process.returncode == 75 and not (tmp_path / "run" / "run.lock").exists()


def test_of_two_launches_one_runs(tmp_path: Path, shards: str) -> None:
    """And a third, before the first has taken the run's own lock."""
    run = tmp_path / "run"
    words = ("launch.gpus_per_node=1", "--wait")
    both = [seer("launch", shards, run, *words) for _ in range(2)]
    while not (run / "launch" / "rank-0.pid").exists():
        time.sleep(0.01)
    third = seer("launch", shards, run, *words)
    lines = [told(process) for process in (third, *both)]
    assert sorted(process.returncode for process in (third, *both)) == [0, 2, 2]
    refused = [said for said in lines if said]
    assert all(len(said) == 1 and "is in use by process" in said[0] for said in refused) and len(refused) == 2
    assert json.loads((run / "launch" / "status.json").read_text())["exit_code"] == 0


def test_a_lock_of_another_machine_is_taken_over_by_a_launch(tmp_path: Path, shards: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lock = json.dumps({"host": "elsewhere", "boot": "b", "pid": 7, "started": 1, "token": "t"})
    (run / "run.lock").write_text(lock)
    refused = seer("launch", shards, run, "launch.gpus_per_node=1")
    lines = told(refused)
    assert refused.returncode == 2 and len(lines) == 1 and "process 7 on elsewhere" in lines[0]
    assert "--take-over" in lines[0] and [path.name for path in run.iterdir()] == ["run.lock"]
    process = seer("launch", shards, run, "launch.gpus_per_node=1", "--wait", "--take-over")
    assert told(process) == [] and process.returncode == 0
