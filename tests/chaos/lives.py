"""Runs as their users start them, in processes of their own, to be killed at any moment and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from torch import Tensor

from seer.checkpoint.store import CheckpointStore

PATIENCE = 90.0  # seconds for what takes seconds on a quiet machine

# Mid-epoch (48 images are 6 batches), two data workers, a queue in use, momentum, a checkpoint every third step.
SMALL_RUN = (
    *("experiment=demo", "optimizer=larc", "train.steps=30", "train.global_batch_size=8", "train.threads=1"),
    *("train.precision=fp32", "train.log_every_steps=1", "data.workers=2", "data.large.size=32", "data.small.size=24"),
    *("data.small.count=2", "objective.prototypes=8", "objective.queue_images=16", "objective.queue_start_steps=1"),
    *("objective.freeze_prototypes_steps=2", "checkpoint.every_steps=3", "evaluation.every_steps=0"),
    *("evaluation.train=[]", "evaluation.val=[]", "parallel.timeout_seconds=30"),
)


class Life:
    """A `seer train` of one or several processes, alone in its session; ended with the block that opens it."""

    def __init__(self, run: Path, shards: str, *overrides: str, ranks: int = 1) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        given = dict(word.split("=", 1) for word in (*SMALL_RUN, f"data.shards={shards}", f"run_dir={run}", *overrides))
        words = [f"{key}={value}" for key, value in given.items()]
        self.run, self.ranks = run, ranks
        self.log = run.with_suffix(".log")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "-m", "seer", "train", *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            kill(pid, signal.SIGKILL)
        self.process.wait()

    def rank_pids(self) -> list[int]:
        """The processes that train: without the launcher and the data workers."""
        if self.ranks == 1:
            return [self.process.pid]
        return children(self.process.pid)

    def wait_for_step(self, step: int) -> None:
        """Until the run has logged a step, or is over."""
        deadline = time.monotonic() + PATIENCE
        while last_step(self.run) < step and self.process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.01)

    def end(self) -> int:
        """Waits for the end; its exit code."""
        try:
            return self.process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.log.read_text()[-3000:]) from None


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines), default=0)


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def final_tensors(run: Path) -> dict[str, Tensor]:
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    return newest.tensors()


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return [*found, *(below for child in found for below in descendants(child))]


def gone(pids: list[int]) -> bool:
    """Whether these processes end within seconds; zombies count as ended (who reaps them is not our affair)."""
    deadline = time.monotonic() + PATIENCE
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    """Whether a process has not ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
